"""The corpus as token ids, made once and kept in a directory."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import corpus

Ids = npt.NDArray[np.uint16]

CODE_BYTES, PROSE_BYTES = 4_000_000, 1_000_000
DOCUMENTS_PER_SOURCE = 4
DOCUMENT_TOKENS = range(256, 1025)
KINDS = ("code", "prose")


class Dataset:
    """Training, validation and held-out ids below one directory; what is missing is made by `make`."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory

    @property
    def is_made(self) -> bool:
        return (self.directory / "sources.json").exists()

    def make(self, tokenizer: Tokenizer) -> None:
        """Reads the installed packages and writes their ids.

        Raises:
            ValueError: a package is not permissively licensed, or the vocabulary doesn't fit into 16 bits.
            importlib.metadata.PackageNotFoundError: one isn't installed.
        """
        if tokenizer.get_vocab_size() > 1 << 16:
            raise ValueError(f"{tokenizer.get_vocab_size()} ids do not fit into 16 bits")
        training, validation = corpus.split_validation(corpus.read(corpus.TRAINING, CODE_BYTES, PROSE_BYTES))
        held_out = corpus.read(corpus.HELD_OUT, CODE_BYTES, PROSE_BYTES)
        held_out = corpus.without_copies(held_out, [*training, *validation])
        self.directory.mkdir(parents=True, exist_ok=True)
        sizes: dict[str, dict[str, int]] = {}
        streams: dict[str, Ids] = {}
        for name in corpus.TRAINING:
            for kind in KINDS:
                chosen = [d for d in training if d.source == name and d.prose == (kind == "prose")]
                streams[f"{name}/{kind}"] = np.concatenate([np.zeros(0, np.uint16), *corpus.tokens(chosen, tokenizer)])
                sizes.setdefault(name, {})[f"{kind}_bytes"] = sum(len(d.text.encode()) for d in chosen)
        np.savez(self.directory / "training.npz", allow_pickle=False, **streams)
        self._save_documents("validation", validation, tokenizer, corpus.TRAINING)
        self._save_documents("held-out", held_out, tokenizer, corpus.HELD_OUT)
        described = {d.name: d for d in map(corpus.describe, (*corpus.TRAINING, *corpus.HELD_OUT))}
        table = {
            name: {"version": d.version, "licence": d.licence, **sizes.get(name, {"held_out": 1})}
            for name, d in described.items()
        }
        (self.directory / "sources.json").write_text(json.dumps(table, indent=1) + "\n")

    def _save_documents(
        self, part: str, documents: Sequence[corpus.Document], tokenizer: Tokenizer, names: Iterable[str]
    ) -> None:
        """The first few of each source, cut to what one forward pass takes."""
        arrays: dict[str, Ids] = {}
        for name in names:
            for kind in KINDS:
                chosen = [d for d in documents if d.source == name and d.prose == (kind == "prose")]
                coded = corpus.tokens(chosen[: 4 * DOCUMENTS_PER_SOURCE], tokenizer)
                pairs = [(d, ids) for d, ids in zip(chosen, coded, strict=False) if len(ids) >= DOCUMENT_TOKENS.start]
                for document, ids in pairs[:DOCUMENTS_PER_SOURCE]:
                    arrays[f"{kind} {name} {document.path}"] = ids[: DOCUMENT_TOKENS.stop - 1]
        np.savez(
            self.directory / f"{part}.npz",
            allow_pickle=False,
            **{key.replace("/", "|"): value for key, value in arrays.items()},
        )

    def stream(self, kind: str, names: Sequence[str] = corpus.TRAINING) -> Ids:
        """All training ids of a kind, document after document, of these sources."""
        with np.load(self.directory / "training.npz", allow_pickle=False) as arrays:
            return np.concatenate([arrays[f"{name}/{kind}"] for name in names])

    def documents(self, part: str, kind: str) -> dict[str, Ids]:
        """``validation`` or ``held-out`` documents of a kind, by source and path."""
        with np.load(self.directory / f"{part}.npz", allow_pickle=False) as arrays:
            return {key.partition(" ")[2]: arrays[key] for key in arrays.files if key.startswith(kind + " ")}

    def sources(self) -> dict[str, dict[str, object]]:
        """Version, licence and bytes of every distribution."""
        table: dict[str, dict[str, object]] = json.loads((self.directory / "sources.json").read_text())
        return table
