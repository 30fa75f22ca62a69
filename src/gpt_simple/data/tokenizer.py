"""Text to token ids and back.

A tokenizer is a byte-level BPE trained on the data, plain bytes (the same thing without merges), or a tokenizer.json.
All are one class over the `tokenizers` library and one file on disk, so that what a run trained with can be loaded
anywhere; where it gives the same ids, text goes through tiktoken. Text never becomes a special token, whatever it
contains: only the end of a document does. Encoding needs numpy (encoder.py), loading does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from gpt_simple._files import write_whole
from gpt_simple.config.schema import DataConfig
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
"""Names that known tokenizers give the end of a document, in the order of their precedence."""

FILE = "tokenizer.json"
BYTE_IDS = 257
"""Ids of `bytes`: one for each byte and one for the end of a document."""
_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")
"""The parts of a tokenizer.json that determine ids."""

UNREACHABLE = "\ue000" * 200
"""The name of a token that no text contains."""

SHOWN = 20
"""How many special tokens an error lists."""

PIECE = 1 << 16
"""Longer texts are encoded in pieces of about this many characters: in parallel, and in bounded memory."""

STRETCH = 256
"""Training a tokenizer takes time quadratic in the length of a word: longer words are cut for it."""

_CUT = re.compile(r"[!-~](?=\n)")

Train = Callable[[DataConfig, Callable[[], Iterator[str]]], Tokenizer]
"""How a tokenizer is made from the texts that the function gives."""


@frozen(eq=False)
class JsonTokenizer:
    """A tokenizer of the `tokenizers` library: everything about it is in one JSON document."""

    name: str
    backend: Backend
    eod_id: int

    def __attrs_post_init__(self) -> None:
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    @cached_property
    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.backend.to_str())
        return spec

    @cached_property
    def _encoding(self) -> tuple[dict[str, Any], Backend]:
        """What text is encoded with: the same tokenizer, except that no text becomes the end of a document."""
        spec = without_end(self._spec, self.backend.id_to_token(self.eod_id))
        if spec is None:
            return self._spec, self.backend
        backend = Backend.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return spec, backend

    @cached_property
    def settings(self) -> str:
        """A text of all that determines how documents are encoded."""
        usual = _known_end(self.backend) == self.eod_id
        end = "" if usual else f" end {self.eod_id}"
        # Text that became the end of a document in an earlier version is encoded otherwise now.
        return self.fingerprint + end + (" text" if self._encoding[1] is not self.backend else "")

    @cached_property
    def vocab_size(self) -> int:
        return max(self.backend.get_vocab().values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        text = json.dumps({key: self._spec[key] for key in _IDS}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _encode(self) -> Callable[[Sequence[str]], Iterable[NDArray[np.uint32]]]:
        from gpt_simple.data.encoder import encoder  # needs numpy; loading a tokenizer does not

        spec, backend = self._encoding
        return encoder(backend, spec, plain=is_plain(spec))

    def _arrays(self, texts: Sequence[str]) -> Iterator[list[NDArray[np.uint32]]]:
        """The ids of each text, in one or more arrays."""
        plain = is_plain(self._encoding[0])
        groups = [list(pieces(text)) if plain else [text] for text in texts]
        encoded = iter(self._encode([piece for group in groups for piece in group]))
        return ([next(encoded) for _ in group] for group in groups)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[index for part in parts for index in part.tolist()] for parts in self._arrays(texts)]

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts in one array, each text followed by ``eod_id``, and how many each has with it.

        Faster than lists of Python's numbers.
        """
        import numpy as np

        end, arrays, sizes = np.array([self.eod_id], np.uint32), [], []
        for parts in self._arrays(texts):
            arrays += [*parts, end]
            sizes.append(sum(map(len, parts)) + 1)
        return np.concatenate(arrays), np.array(sizes)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self) -> NDArray[np.int32]:
        import numpy as np

        added = {token["id"]: token["special"] for token in self._spec["added_tokens"]}
        byte_level = "ByteLevel" in json.dumps([self._spec["pre_tokenizer"], self._spec["decoder"]])
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self.backend.get_vocab().items():
            if index == self.eod_id or added.get(index):
                continue
            if byte_level and index not in added:
                sizes[index] = len(token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                sizes[index] = 1
            else:
                sizes[index] = len(token.replace("▁", " ").encode())
        return sizes

    @cached_property
    def token_bytes_are_exact(self) -> bool:
        """Whether ``token_bytes`` of the ids of any text adds up to the bytes of the text."""
        return divides_bytes(self._spec)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / FILE, self.backend.to_str())


def bpe(config: DataConfig, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """Byte-level BPE with at most ``tokenizer_vocab_size`` ids, trained on ``texts()``; deterministic.

    Fewer ids come out when the texts hold no further pair that repeats.
    """
    return JsonTokenizer("bpe", _train(config.tokenizer_vocab_size, texts()), 0)


def bytes(config: DataConfig, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """One id per byte of UTF-8, and one for the end of a document: 257 ids."""
    return JsonTokenizer("bytes", _train(BYTE_IDS, ()), 0)


def load_tokenizer(path: Path, name: str | None = None, end: str | int | None = None) -> JsonTokenizer:
    """A tokenizer.json, or a directory that holds one. A name that does not exist is an error, never a fallback.

    ``end`` is the token that ends a document, or its id; by default the first of ``KNOWN_ENDS`` that exists.
    """
    file = path / FILE if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise DataError(
            f"tokenizer {path}: there is no {file}", hint="expected a tokenizer.json or a directory with one"
        )
    try:
        backend = Backend.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"tokenizer {file}: not a tokenizer.json that the tokenizers library reads ({error})"
        ) from error
    eod = end if isinstance(end, int) else _known_end(backend) if end is None else backend.token_to_id(end)
    if eod is None:
        tokens = sorted(backend.get_added_tokens_decoder().items())
        special = ", ".join(token.content for _, token in tokens[:SHOWN] if token.special) or "none"
        missing = f"none of {', '.join(KNOWN_ENDS)}" if end is None else f"no token {end!r}"
        raise DataError(
            f"tokenizer {file}: it has no token that ends a document: {missing}",
            hint=f"name one of its tokens with data.end_token (its special tokens: {special})",
        )
    return JsonTokenizer(name or str(path), backend, eod)


def _known_end(backend: Backend) -> int | None:
    ends = (backend.token_to_id(token) for token in KNOWN_ENDS)
    return next((index for index in ends if index is not None), None)


def _train(vocab_size: int, texts: Iterable[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for piece in pieces(text) for part in stretches(piece))
    backend.train_from_iterator(parts, trainer)
    return backend


def without_end(spec: Mapping[str, Any], end: str | None) -> dict[str, Any] | None:
    """``spec`` of a tokenizer.json, changed so that no text is encoded as the token ``end``; None if none is anyway.

    All other ids are the same. A model that encodes what it lacks as ``end`` is left as it is.
    """
    model, added = spec["model"], spec["added_tokens"]
    vocab = model["vocab"]
    pieces = [piece for piece, _ in vocab] if isinstance(vocab, list) else vocab
    if end is None:
        return None
    merges = [pair for pair in model.get("merges") or () if end in (*pair, _merged(pair, model))]
    reachable = end in pieces and (model["type"] != "BPE" or bool(merges) or bool(model.get("ignore_merges")))
    if reachable and (model.get("unk_token") == end or len(end) == 1):
        return None
    if reachable:
        names = {end: UNREACHABLE}
        renamed: Any
        if isinstance(vocab, list):
            renamed = [[names.get(piece, piece), score] for piece, score in vocab]
        else:
            renamed = {names.get(piece, piece): index for piece, index in vocab.items()}
        model = {**model, "vocab": renamed}
        if merges:
            model["merges"] = [pair for pair in model["merges"] if pair not in merges]
        return {**spec, "model": model, "added_tokens": [token for token in added if token["content"] != end]}
    if all(token["special"] for token in added if token["content"] == end):
        return None
    # The library does not search text for special tokens.
    return {
        **spec,
        "added_tokens": [token | {"special": token["special"] or token["content"] == end} for token in added],
    }


def _merged(pair: Sequence[str], model: Mapping[str, Any]) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def is_plain(spec: Mapping[str, Any]) -> bool:
    """Whether text is split by the byte-level pattern alone, as in the tokenizers that are trained here.

    ``spec`` is the content of a tokenizer.json.
    """
    pattern = spec["pre_tokenizer"] or {}
    return (
        spec["normalizer"] is None
        and pattern.get("type") == "ByteLevel"
        and not pattern["add_prefix_space"]
        and pattern["use_regex"]
        and all(token["special"] for token in spec["added_tokens"])
    )


def divides_bytes(spec: Mapping[str, Any]) -> bool:
    """Whether the tokens of any text are its bytes, cut into pieces. ``spec``: the content of a tokenizer.json."""
    first, model = spec["pre_tokenizer"] or {}, spec["model"]
    steps = first.get("pretokenizers", [first])
    return (
        spec["normalizer"] is None
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(_keeps_characters(step) for step in steps)
        and model["type"] == "BPE"
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and all(character in model["vocab"] for character in pre_tokenizers.ByteLevel.alphabet())
        and not any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"] if not token["special"])
    )


def _keeps_characters(step: Mapping[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer neither adds nor removes text."""
    if step.get("type") == "ByteLevel":
        return not step["add_prefix_space"]
    return step.get("type") == "Digits" or (step.get("type") == "Split" and step["behavior"] != "Removed")


def pieces(text: str) -> Iterator[str]:
    """Cut where the byte-level pattern cuts anyway, before a newline that follows a printable ASCII character."""
    start = 0
    while len(text) - start > PIECE and (cut := _CUT.search(text, start + PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def stretches(text: str) -> Iterator[str]:
    """Cut runs of hundreds of characters without a space, or of nothing else, as in encoded binaries and padding."""
    start = 0
    for end in range(STRETCH, len(text), STRETCH):
        block = text[end - STRETCH : end]
        if block.split(None, 1) in ([], [block]):
            yield text[start:end]
            start = end
    yield text[start:]
