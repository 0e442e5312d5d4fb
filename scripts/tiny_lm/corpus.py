"""The text of the test model: source code and English prose of permissively licensed packages that are installed.

Training and held-out text come from different distributions, so that nothing measured was ever trained on. What a
package vendors is left out of both, and so is a held-out file much of which stands in the training text as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import pathlib
import platform
import pydoc_data.topics
import random
import re
import string
import sysconfig
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

STDLIB = "cpython"
ORIGINAL = (
    "transformers",
    "sglang",
    "torch",
    "scipy",
    "sympy",
    "numpy",
    "networkx",
    "aiohttp",
    "fastapi",
    "pydantic",
    "openai",
    "mpmath",
    STDLIB,
)
"""What the first version of the model was trained on."""
TRAINING = (
    *ORIGINAL,
    "pandas",
    "numba",
    "anthropic",
    "huggingface_hub",
    "setuptools",
    "Pygments",
    "torchvision",
    "pyarrow",
    "mypy",
    "modelscope",
    "Cython",
    "grpcio",
    "pillow",
    "protobuf",
    "lxml",
    "tilelang",
    "datasets",
    "triton",
)
HELD_OUT = (
    "jedi",
    "parso",
    "rich",
    "click",
    "typer",
    "starlette",
    "uvicorn",
    "httpx",
    "Jinja2",
    "lark",
    "prompt_toolkit",
    "prometheus_client",
    "urllib3",
    "requests",
    "traitlets",
    "ipython",
    "timm",
    "fsspec",
    "jsonschema",
    "psutil",
    "anyio",
    "wcwidth",
)
"""Measured on, and never trained on. Not `packaging`, for torch vendors it."""

_PERMISSIVE = re.compile(r"apache|bsd|\bmit\b|mit-cmu|psf|python software foundation|bsl-1\.0", re.IGNORECASE)
_COPYLEFT = re.compile(r"gpl|mozilla|\bmpl\b|mpl-", re.IGNORECASE)
_FOREIGN = re.compile(r"(^|/)(_?vendor(ed)?|_distutils|third_?party|3rdparty|externals?|extern)(/|$)|_pb2")
_PROSE_FILES = (".md", ".rst", ".txt", "/METADATA")
_FILE_BYTES = range(400, 200_000)
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_LETTERS = (string.ascii_letters + string.whitespace).encode()
_SENTENCE = (string.ascii_letters + " \n,.'").encode()
_END = 0
_WORD = re.compile(r"[A-Za-z]{2,}")
_SHARED_LINE_CHARACTERS = 30


@dataclasses.dataclass(frozen=True)
class Document:
    """A file's code, or the prose found in it.

    Attributes:
        source: the distribution it is from, or ``cpython``.
        path: of the file, relative to where packages are installed.
        prose: English sentences rather than the file itself.
        text: what is tokenized.
    """

    source: str
    path: str
    prose: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A distribution whose text is used: its name, version and licence as its metadata has them."""

    name: str
    version: str
    licence: str


def describe(name: str) -> Source:
    """Version and licence of a distribution.

    Raises:
        ValueError: its metadata doesn't name a permissive licence.
        importlib.metadata.PackageNotFoundError: it isn't installed.
    """
    if name == STDLIB:
        return Source(name, platform.python_version(), "PSF-2.0")
    metadata = importlib.metadata.metadata(name).json
    classifiers = [value for value in metadata.get("classifier", []) if value.startswith("License ::")]
    candidates = [
        metadata.get("license_expression"),
        *(value.rpartition(":: ")[2] for value in classifiers),
        metadata.get("license"),
    ]
    licence = next((str(value).strip().splitlines()[0] for value in candidates if value and str(value).strip()), "")
    if not _PERMISSIVE.search(licence) or _COPYLEFT.search(licence):
        raise ValueError(f"{name} is not known to be permissively licensed: {licence!r}")
    return Source(name, str(metadata["version"]), licence)


def read(names: Sequence[str], code_bytes: int, prose_bytes: int, seed: int = 0) -> list[Document]:
    """Code and prose of distributions, a random choice of whole files from each that is larger than the bound.

    Args:
        names: distributions, ``cpython`` for the standard library.
        code_bytes: most code to take of one distribution.
        prose_bytes: most prose.
        seed: of the choice.

    Raises:
        ValueError: as `describe`.
        importlib.metadata.PackageNotFoundError: one isn't installed.
    """
    documents, seen = [], set()
    for name in names:
        describe(name)
        files = sorted(_files(name))
        random.Random(f"{seed} {name}").shuffle(files)
        left = {False: code_bytes, True: prose_bytes}
        for relative, file in files:
            for document in _documents(name, relative, file, left):
                digest = hashlib.sha256(document.text.encode()).digest()
                size = len(document.text.encode())
                if digest not in seen and size <= left[document.prose]:
                    seen.add(digest)
                    left[document.prose] -= size
                    documents.append(document)
    return documents


def without_copies(held_out: Sequence[Document], training: Sequence[Document], share: float = 0.1) -> list[Document]:
    """Held-out documents of which at most ``share`` of the longer lines occurs in the training text."""
    known = {line for document in training for line in _long_lines(document.text)}
    kept = []
    for document in held_out:
        lines = _long_lines(document.text)
        if lines and sum(line in known for line in lines) <= share * len(lines):
            kept.append(document)
    return kept


def split_validation(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, validation): one file in 128 is put aside to watch training; it says nothing about other packages."""
    aside = [hashlib.sha256(f"{d.source}/{d.path}".encode()).digest()[0] < 2 for d in documents]
    pairs = list(zip(documents, aside, strict=True))
    return [d for d, out in pairs if not out], [d for d, out in pairs if out]


def tokens(documents: Sequence[Document], tokenizer: Tokenizer) -> list[npt.NDArray[np.uint16]]:
    """One id array per document, each beginning with the end-of-text token that divides documents in training.

    Marks such as ``<|im_end|>`` inside a text are text.
    """
    tokenizer.encode_special_tokens = True
    arrays = []
    for start in range(0, len(documents), 256):
        texts = [document.text for document in documents[start : start + 256]]
        arrays += [np.array([_END, *coded.ids], dtype=np.uint16) for coded in tokenizer.encode_batch_fast(texts)]
    return arrays


def prose_of(text: str) -> str:
    """The paragraphs of ``text`` that are mostly words; "" if there is too little of them."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip()
        if _share(lines, _SENTENCE) >= 0.9 and len(_WORD.findall(lines)) >= 8:
            kept.append("\n".join(line.strip() for line in lines.splitlines()))
    joined = "\n\n".join(kept)
    return joined + "\n" if len(joined) >= _FILE_BYTES.start else ""


def _files(name: str) -> Iterator[tuple[str, pathlib.Path]]:
    if name == STDLIB:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        for path in root.rglob("*"):
            relative = path.relative_to(root).as_posix()
            if not relative.startswith(("site-packages", "test/", "lib2to3/tests", "config-")):
                yield relative, path
        return
    for file in importlib.metadata.distribution(name).files or []:
        yield file.as_posix(), pathlib.Path(str(file.locate()))


def _documents(name: str, relative: str, path: pathlib.Path, left: Mapping[bool, int]) -> Iterator[Document]:
    """The code and the prose of a file, as far as there is room for them: ``left`` says how many bytes of each."""
    is_code = relative.endswith(".py")
    if not (is_code or relative.endswith(_PROSE_FILES)) or _FOREIGN.search(relative) or not path.is_file():
        return
    size = path.stat().st_size
    is_topics = relative == "pydoc_data/topics.py"
    if size not in _FILE_BYTES and not is_topics:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if left[True] >= _FILE_BYTES.start:
        sentences = "\n\n".join(pydoc_data.topics.topics.values()) if is_topics else text
        prose = prose_of(_strings(text) if is_code and not is_topics else sentences)
        if prose:
            yield Document(name, relative, True, prose)
    if is_code and size <= left[False] and not is_topics and not _is_data(text):
        yield Document(name, relative, False, text)


def _strings(source: str) -> str:
    """The docstrings of a module, and its other strings in triple quotes."""
    return "\n\n".join(inspect.cleandoc(found[1]) for found in _TRIPLE_QUOTED.findall(source))


def _is_data(text: str) -> bool:
    """A table in the form of a module: digits and punctuation, or lines without end."""
    return _share(text, _LETTERS) < 0.55 or len(text) > 200 * (text.count("\n") + 1)


def _share(text: str, characters: bytes) -> float:
    """Which part of the UTF-8 text consists of these bytes."""
    data = text.encode()
    return 1 - len(data.translate(None, characters)) / max(len(data), 1)


def _long_lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if len(line) >= _SHARED_LINE_CHARACTERS]
