"""Packing: which short pieces share a sequence, and the stored plan by which whole documents do.

With `data.sampling.pack_documents` a row is no cut of the token stream but a pack of whole documents, each a segment of
its own that sees nothing of its neighbours. `python -m data_prep.pack` works the packs out for one sequence length and
leaves them beside the shards: `packs/<sequence_length>/`, two files a shard and `plan.json`. A pack is then a row like
any other: drawn by a computed permutation, without replacement in an epoch, under any mixture.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.files import atomic_write, write_json
from data_prep.manifest import SPLITS, StreamInfo
from data_prep.shards import Shard

if TYPE_CHECKING:
    from data_prep.dataset import Dataset

FILE = "plan.json"
WINDOW = 1024
"""Neighbouring pieces among which those that fit together are looked for."""
PIECE = np.dtype([("start", "<i8"), ("tokens", "<i4")])
"""A document, or a part of one that is longer than a sequence: its first token in the shard, and its tokens."""

COLUMNS = ("sequence length", "stream", "split", "documents", "pieces", "sequences", "filled")
"""Of `PackPlan.rows`."""


def pack(sizes: NDArray[np.int64], slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which pieces share a sequence: order int64 [N] and edges int64 [packs + 1].

    Pack p is order[edges[p] : edges[p + 1]].
    Best fit decreasing (Johnson 1973) in windows of `WINDOW` neighbours: larger ones first, each into the pack where
    it leaves the least room. A pure function of the sizes. sizes: at most `slots` each.
    """
    order = [np.zeros(0, dtype=np.int64)]
    counts = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(sizes), WINDOW):
        part = sizes[start : start + WINDOW]
        packs: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (free slots, pack), sorted
        for number in np.argsort(-part, kind="stable").tolist():
            size = int(part[number])
            at = bisect_left(rooms, (size, -1))
            if at < len(rooms):
                room, chosen = rooms.pop(at)
                packs[chosen].append(start + number)
            else:
                room, chosen = slots, len(packs)
                packs.append([start + number])
            insort(rooms, (room - size, chosen))
        order.append(np.array([number for members in packs for number in members], dtype=np.int64))
        counts.append(np.array([len(members) for members in packs], dtype=np.int64))
    return np.concatenate(order), np.concatenate([[0], np.concatenate(counts).cumsum()])


def cut(starts: NDArray[np.int64], longest: int) -> NDArray[Any]:
    """The pieces of a shard's documents, `PIECE` [N]: those longer than `longest` tokens come in parts of that size.

    starts: int64 [documents + 1], first token of each document and the number of tokens.
    """
    sizes = np.diff(starts)
    parts = -(-sizes // longest)
    within = np.arange(int(parts.sum())) - (parts.cumsum() - parts).repeat(parts)
    pieces = np.empty(len(within), dtype=PIECE)
    pieces["start"] = starts[:-1].repeat(parts) + within * longest
    pieces["tokens"] = np.minimum(longest, sizes.repeat(parts) - within * longest)
    return pieces


@dataclass(frozen=True)
class ShardPacks:
    """The packs of one shard."""

    stream: str
    """`<source>.<lang>`."""
    split: str
    file: str
    """Name of its two files in the plan's folder, without their endings."""
    documents: int
    tokens: int
    pieces: int
    packs: int


@dataclass(frozen=True)
class Fill:
    """How well the documents of a stream fill its sequences."""

    documents: int
    pieces: int
    """Documents, those longer than a sequence counted by their parts."""
    packs: int
    fill: float
    """Part of the slots that hold something, where nothing is left out (a gMASK or causal sample)."""


class PackPlan:
    """The packs of a dataset for one sequence length."""

    def __init__(self, folder: Path, slots: int, opening: int, shards: Sequence[ShardPacks]) -> None:
        """slots: sequence_length. opening: slots of a segment before its text."""
        self.folder = folder
        self.slots = slots
        self.opening = opening
        self.shards = list(shards)

    @staticmethod
    def folder_of(dataset: "Dataset", slots: int, opening: int) -> Path:
        """Where a plan lies."""
        return dataset.folder / "packs" / (f"{slots}-enc" if opening else str(slots))

    @staticmethod
    def write(dataset: "Dataset", slots: int, opening: int = 0) -> "PackPlan":
        """Work out the packs of every shard of text, and store them, `plan.json` last.

        Each piece takes its tokens, a slot for its mask and `opening` more. Raises DataError where there is no text, or
        the disk is full.
        """
        folder = PackPlan.folder_of(dataset, slots, opening)
        made = []
        for split in SPLITS:
            for info, shards in dataset.text_shards(split):
                for number, shard in enumerate(shards):
                    pieces = cut(shard.document_starts(), slots - 1 - opening)
                    order, edges = pack(pieces["tokens"].astype(np.int64) + 1 + opening, slots)
                    file = f"{split}/{info.key}-{number:05d}"
                    (folder / split).mkdir(parents=True, exist_ok=True)
                    for ending, values in (("pieces", pieces[order]), ("edges", edges)):
                        with atomic_write(folder / f"{file}.{ending}.npy") as out:
                            np.save(out, values)
                    counts = shard.documents, shard.tokens, len(pieces), len(edges) - 1
                    made.append(ShardPacks(info.key, split, file, *counts))
        if not made:
            raise DataError(
                f"{dataset.folder}: holds no text to pack; leave data.sampling.pack_documents out, instructions are "
                "packed without a plan"
            )
        head = {"manifest": dataset.digest, "sequence_length": slots, "opening": opening}
        write_json(folder / FILE, head | {"shards": [asdict(one) for one in made]})
        return PackPlan(folder, slots, opening, made)

    @staticmethod
    def read(dataset: "Dataset", slots: int, opening: int = 0) -> "PackPlan":
        """The stored plan. Raises DataError where there is none, or it is of other data."""
        folder = PackPlan.folder_of(dataset, slots, opening)
        command = f"python -m data_prep.pack data.path={dataset.folder} sequence_length={slots}"
        command += " data.sampling.starts_with_enc=true" if opening else ""
        try:
            digest, plan = PackPlan._load(folder)
        except FileNotFoundError:
            raise DataError(
                f"{folder / FILE}: missing; data.sampling.pack_documents=true needs a plan for this length: {command}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / FILE}: damaged ({error}); make it anew: {command}") from error
        if digest != dataset.digest:
            raise DataError(f"{folder / FILE}: made for other data than the folder holds now; make it anew: {command}")
        return plan

    @staticmethod
    def every(dataset: "Dataset") -> list["PackPlan"]:
        """All plans of the dataset, shorter sequences first."""
        found = [PackPlan._load(path.parent) for path in dataset.folder.glob(f"packs/*/{FILE}")]
        plans = [plan for digest, plan in found if digest == dataset.digest]
        return sorted(plans, key=lambda plan: (plan.slots, plan.opening))

    @staticmethod
    def _load(folder: Path) -> tuple[str, "PackPlan"]:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        shards = [ShardPacks(**one) for one in content["shards"]]
        return content["manifest"], PackPlan(folder, content["sequence_length"], content["opening"], shards)

    def of(self, stream: str, split: str) -> list[ShardPacks]:
        """The packs of a stream's shards, in the manifest's order."""
        return [one for one in self.shards if (one.stream, one.split) == (stream, split)]

    def fill(self, stream: str, split: str) -> Fill:
        """How full a stream's sequences are."""
        every = self.of(stream, split)
        pieces, packs = sum(one.pieces for one in every), sum(one.packs for one in every)
        filled = sum(one.tokens for one in every) + pieces * (1 + self.opening)
        return Fill(sum(one.documents for one in every), pieces, packs, filled / max(1, packs * self.slots))

    def rows(self) -> list[tuple[str, ...]]:
        """How full the sequences are, a row a split and stream; the columns are `COLUMNS`."""
        found = []
        for split, stream in dict.fromkeys((one.split, one.stream) for one in self.shards):
            fill = self.fill(stream, split)
            counts = (f"{count:,}" for count in (fill.documents, fill.pieces, fill.packs))
            found.append((str(self.slots), stream, split, *counts, f"{fill.fill:.1%}"))
        return found


class PackedStream:
    """The documents of one source in one language and one split, whole ones packed for one sequence length.

    A row is a pack: an epoch goes through every document once. The maps open on first use, so a stream survives
    pickling and fork.
    """

    unused_tokens = 0
    """Every token of every document is in a pack."""

    def __init__(self, info: StreamInfo, shards: list[Shard], plan: PackPlan, split: str) -> None:
        """Raises DataError where a file of the plan is missing or cut off."""
        self.info = info
        self.shards = shards
        self.fill = plan.fill(info.key, split)
        self.rows = self.fill.packs
        """Packs."""
        self.hash = xxhash.xxh3_64_intdigest(info.key.encode())
        """As `Stream.hash`."""
        own = plan.of(info.key, split)
        self._last_rows = np.cumsum([one.packs for one in own], dtype=np.int64)
        self._files = [str(plan.folder / one.file) for one in own]
        self._maps: dict[int, list[NDArray[Any]]] = {}
        for number, one in enumerate(own):
            if [len(values) for values in self._open(number)] != [one.pieces, one.packs + 1]:
                raise DataError(f"{self._files[number]}: is not the file that plan.json names; pack the data again")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}

    @property
    def key(self) -> str:
        """`<source>.<lang>`."""
        return self.info.key

    def read_pieces(self, row: int) -> list[NDArray[np.int64]]:
        """The pieces of a pack, int64 [tokens] each, documents with their eod."""
        number = int(np.searchsorted(self._last_rows, row, side="right"))
        row -= int(self._last_rows[number - 1]) if number else 0
        if number not in self._maps:
            self._maps[number] = self._open(number)
        pieces, edges = self._maps[number]
        mine = pieces[edges[row] : edges[row + 1]].tolist()
        return [self.shards[number].read(start, tokens) for start, tokens in mine]

    def _open(self, number: int) -> list[NDArray[Any]]:
        try:
            paths = [f"{self._files[number]}.{ending}.npy" for ending in ("pieces", "edges")]
            return [np.load(path, mmap_mode="r").view(np.ndarray) for path in paths]
        except (OSError, ValueError) as error:
            raise DataError(f"{self._files[number]}: cannot be read ({error}); pack the data again") from error
