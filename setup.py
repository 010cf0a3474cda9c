"""Reads every value from settings.ini; edit there, not here."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_name"]


def words(key): return cfg.get(key, "").split()


setup(
    name=lib, version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: words("package_data")},
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={key.removesuffix("_requirements"): words(key)
                    for key in cfg if key.endswith("_requirements")},
    entry_points={"console_scripts": words("console_scripts"),
                  "nbdev": [f"{lib}={lib}._modidx:d"]},
    zip_safe=False,
)
