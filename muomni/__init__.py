__version__ = "0.1.0"

def __getattr__(name):
    "`from muomni import Omni`, and only then is torch loaded"
    if name == "Omni":
        from muomni.inference import Omni
        return Omni
    raise AttributeError(f"module 'muomni' has no attribute {name!r}")


def __dir__(): return sorted([*globals(), "Omni"])
