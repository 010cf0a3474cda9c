"""A server on the loopback interface that can continue a file, hang up in the middle of it, or forget how to continue."""
import hashlib, io, json, tarfile, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from PIL import Image


class Shaky:
    "Serves `files`; after `drop` bytes of an answer it hangs up; `ranges=False`: it knows no Range"

    def __init__(self):
        self.files, self.drop, self.ranges, self.asked, self.status = {}, None, True, [], None
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): outer.answer(self)
            def do_HEAD(self): outer.answer(self, head=True)
            def log_message(self, *args): pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def __enter__(self):
        threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def mark(self, data): return '"' + hashlib.sha256(data).hexdigest()[:12] + '"'

    def answer(self, h, head=False):
        data, asked, begin = self.files.get(h.path.lstrip("/")), h.headers["Range"], 0
        if not head: self.asked.append(asked)
        if self.status or data is None: return h.send_error(self.status or 404)
        same = h.headers["If-Range"] in (None, self.mark(data))
        if asked and self.ranges and same:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(data): return h.send_error(416)
        h.send_response(206 if begin else 200)
        if begin: h.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        h.send_header("Content-Length", str(len(data) - begin))
        h.send_header("ETag", self.mark(data))
        h.end_headers()
        if not head: h.wfile.write(data[begin:][:self.drop])


def sha(data): return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_bytes(*members, mode="w:gz"):
    "A tar archive of pairs (name, bytes) and of TarInfos"
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode=mode) as tar:
        for m in members:
            if isinstance(m, tarfile.TarInfo): tar.addfile(m); continue
            info = tarfile.TarInfo(m[0])
            info.size = len(m[1])
            tar.addfile(info, io.BytesIO(m[1]))
    return memory.getvalue()


def zip_bytes(*members):
    "A zip archive of pairs (name or ZipInfo, bytes)"
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members: z.writestr(name, data)
    return memory.getvalue()


def picture(side=40, kind="JPEG", grey=120):
    memory = io.BytesIO()
    Image.new("RGB", (side, side), (grey, grey, grey)).save(memory, kind)
    return memory.getvalue()


def flac(seconds=1.0, seed=0):
    import soundfile, torch
    memory = io.BytesIO()
    wave = torch.randn(int(16_000 * seconds), generator=torch.Generator().manual_seed(seed)) / 10
    soundfile.write(memory, wave.numpy(), 16_000, format="FLAC")
    return memory.getvalue()


def small_sets():
    "{name of a file: bytes}: the four sets in the shape of the large ones"
    home = "LibriSpeech/dev-clean/84/121123/"
    speech = [(f"{home}84-121123-{i:04d}.flac", flac(1.0, i)) for i in range(3)]
    said = "".join(f"84-121123-{i:04d} GO ON NUMBER {i}\n" for i in range(3)).encode()
    notes = dict(images=[dict(id=i, file_name=f"{i:012d}.jpg") for i in (7, 9)],
                 annotations=[dict(image_id=i, caption=f"a grey {k}") for i in (7, 9) for k in "abcde"])
    boxes = "".join(f'<taggedRectangle height="9" width="20" x="{x}" y="4"><tag>{w}</tag></taggedRectangle>'
                    for x, w in ((2, "INN"), (15, "CAFE"), (90, "OUT")))
    xml = f"<tagset><image><imageName>img/a.jpg</imageName><taggedRectangles>{boxes}</taggedRectangles></image></tagset>"
    return {"TinyStories-valid.txt": "".join(f"Story {i}.\nIt ends.\n<|endoftext|>\n" for i in range(30)).encode(),
            "dev-clean.tar.gz": tar_bytes(*speech, (home + "84-121123.trans.txt", said)),
            "annotations_trainval2017.zip": zip_bytes(("annotations/captions_val2017.json", json.dumps(notes)), ("annotations/other.json", "{}")),
            "val2017.zip": zip_bytes(*[(f"val2017/{i:012d}.jpg", picture(grey=10 * i)) for i in (7, 9)]),
            "svt.zip": zip_bytes(("svt1/train.xml", xml), ("svt1/img/a.jpg", picture()))}
