"""Every byte of a checkpoint damaged in turn: what comes back is exact, or an error names the file or a leaf that lies in it.

    python -m tests.torture.flips

The first sweep takes each byte of each file of a checkpoint of small leaves; the second each 29th of one with large leaves too, which have
files of their own. The third is the first again, with the manifest made to agree with the damaged file: then the digest of a leaf notices
what matters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import torch
from blake3 import blake3

from fnrun.checkpoint import CheckpointError, Checkpoints, store
from fnrun.core import tree
from fnrun.core.position import Position
from fnrun.core.state import TrainState


def small(step: int) -> TrainState:
    """Leaves that lie together in one pack, some that lie in the manifest, and one that is empty."""
    params = {"w": torch.arange(6.0).reshape(2, 3) + step, "b": torch.tensor([0.5, -0.0]), "half": torch.ones(3, dtype=torch.bfloat16)}
    memory = {"ema": {"w": torch.zeros(2, 3)}, "best": -0.0, "name": "é", "none": None, "empty": torch.empty(0, 4)}
    return TrainState.create(torch.nn.Module(), seed=1).replace(params=params, step=step, memory=memory, position=Position(ticks=step))


def large(step: int) -> TrainState:
    state = small(step)
    return state.replace(params={**state.params, "large": torch.arange(70_000.0), "wide": torch.arange(33_000.0, dtype=torch.float64)})


class Damage(NamedTuple):
    """What is done to which files of a checkpoint, undone by what `do` returns; and the leaves that are lost by it, where that is known."""

    name: str
    files: list[Path]
    do: Callable[[], Callable[[], object]]
    lost: list[str] | None = None


class Sweep:
    """Damages to the newest checkpoint in `folder`, one after the other, and what `restore` made of each."""

    def __init__(self, folder: Path, state: Callable[[int], TrainState]) -> None:
        self.checkpoints, self.older, self.newer = Checkpoints(folder), state(1), state(2)
        for each in (self.older, self.newer):
            self.checkpoints.save(each)
        self.checkpoints.wait()
        (self.directory,) = folder.glob("*2-*2")
        self.files = sorted(path for path in self.directory.rglob("*") if path.is_file())
        self.leaves = [leaf for leaf in self.checkpoints.manifest().leaves if leaf.pieces]
        self.found: Counter[str] = Counter()
        self.bad: list[str] = []

    def __call__(self, damages: Iterable[Damage]) -> Self:
        for damage in damages:
            undo = damage.do()
            try:
                if wrong := self._restore(damage):
                    self.bad.append(f"{damage.name}: {wrong}")
            finally:
                undo()
        for state in (self.older, self.newer):
            assert tree.equal(self.checkpoints.restore(step=state.step), state), "the damage was not undone"
        return self

    def _restore(self, damage: Damage) -> str | None:
        """What is wrong with what `restore` does, if anything is."""
        try:
            state = self.checkpoints.restore()
        except CheckpointError as error:
            return self._judge(damage, error)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        self.found["exact"] += 1
        return None if tree.equal(state, self.newer) else "wrong data"

    def _judge(self, damage: Damage, error: CheckpointError) -> str | None:
        named = any(str(path) in str(error) or f" {path.name} " in str(error) for path in damage.files)
        lost = getattr(error, "leaves", [])
        if named and damage.lost in (None, lost):
            self.found["errors that name the file" + (" and what is lost" if lost else "")] += 1
        elif lost and damage.lost in (None, lost):
            self.found["errors that name what is lost"] += 1
        else:
            return f"an error that does not name it: {error} {lost} {damage.lost}"
        return None

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in self.files)
        found = ", ".join(f"{count} {what}" for what, count in self.found.most_common())
        total = self.found.total() + len(self.bad)
        return "\n".join([f"{total} damages to {len(self.files)} files of {size} bytes: {len(self.bad)} bad; {found}", *self.bad[:20]])

    # --- damages

    def flips(self, chance: random.Random, every: int = 1) -> Iterator[Damage]:
        """All bits of each so-manieth byte, and then one of them."""
        for path in self.files:
            for at in range(0, path.stat().st_size, every):
                for bits in (0xFF, 1 << chance.randrange(8)):
                    yield self.flip(path, at, bits)

    def forged(self, flips: Iterable[Damage]) -> Iterator[Damage]:
        """The same, and a manifest that agrees with the damaged file; the digests of the leaves stay."""
        for flip in flips:
            if flip.files[0].name not in (store.MANIFEST, store.DIGEST):
                yield Damage(
                    f"{flip.name}, forged", [*flip.files, self.directory / store.ARRAYS], lambda flip=flip: self._forge(flip), flip.lost
                )

    def _forge(self, flip: Damage) -> Callable[[], object]:
        before = {path: path.read_bytes() for path in (self.directory / store.MANIFEST, self.directory / store.DIGEST)}
        undo, (file,) = flip.do(), flip.files
        manifest = json.loads(before[self.directory / store.MANIFEST])
        described = manifest["files"][file.relative_to(self.directory).as_posix()]
        if "digest" in described:
            described["digest"] = f"blake3:{blake3(file.read_bytes()).hexdigest()}"
        sign(self.directory, json.dumps(manifest).encode())
        return lambda: (undo(), write(before))

    def flip(self, path: Path, at: int, bits: int) -> Damage:
        def do() -> Callable[[], object]:
            def xor() -> None:
                with path.open("r+b") as file:
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ bits]))

            xor()
            return xor

        return Damage(f"{path.name}: byte {at} ^ {bits:#x}", [path], do, self.lost(path, at))

    def lost(self, path: Path, at: int) -> list[str] | None:
        """The leaf that a byte of an array belongs to: none between the leaves of a pack. None for other files."""
        folder, name = path.parts[-2:]
        if not folder.isdigit() or name == ".zarray":
            return None
        pieces = [(leaf, piece) for leaf in self.leaves for piece in leaf.pieces if self.directory / piece.file == path]
        return [leaf.path for leaf, piece in pieces if piece.offset <= at < piece.offset + leaf.size(piece)]

    def cuts(self) -> Iterator[Damage]:
        """Every file shorter, empty, longer, gone, and a directory."""
        for path in self.files:
            data = path.read_bytes()
            for content in {data[:-1], data[: len(data) // 2], data[: len(data) // 2] + bytes(len(data) - len(data) // 2), data[:1], b""}:
                if content != data:
                    yield self._content({path: content}, f"{path.name}: {len(content)} bytes of {len(data)}")
            yield self._content({path: data + b"\0"}, f"{path.name}: a byte more")
            yield Damage(f"{path.name}: deleted", [path], lambda path=path, data=data: (path.unlink(), lambda: path.write_bytes(data))[1])
            yield Damage(f"{path.name}: a directory", [path], lambda path=path, data=data: self._directory(path, data))

    def swaps(self) -> Iterator[Damage]:
        """Every two files in each other's place."""
        for a, b in itertools.combinations(self.files, 2):
            if (first := a.read_bytes()) != (second := b.read_bytes()):
                yield self._content({a: second, b: first}, f"{a.name} and {b.name} swapped")

    def from_elsewhere(self) -> Iterator[Damage]:
        """Every file from the checkpoint before."""
        for path in self.files:
            other = self.directory.parent / "00000001-00000001" / path.relative_to(self.directory)
            if other.is_file() and other.read_bytes() != path.read_bytes():
                yield self._content({path: other.read_bytes()}, f"{path.name} of the checkpoint before")

    def additions(self) -> Iterator[Damage]:
        """Files that nobody wrote, in every directory; and what looks like a newer checkpoint."""
        for folder in (self.directory, *(path for path in self.directory.rglob("*") if path.is_dir())):
            for name in (".DS_Store", "manifest.json.bak", "00009", ".zattrs", "zarr.json"):
                path = folder / name
                if not path.exists():
                    yield Damage(f"{name} added", [path], lambda path=path: (path.write_bytes(b"{"), path.unlink)[1])
        newer = self.directory.parent / "00000003-00000003"
        yield Damage("a newer checkpoint, a file", [newer], lambda: (newer.write_bytes(b""), newer.unlink)[1])
        yield Damage("a newer checkpoint, empty", [newer], lambda: (newer.mkdir(), newer.rmdir)[1])
        yield Damage("a newer checkpoint, a link to nowhere", [newer], lambda: (newer.symlink_to("nowhere"), newer.unlink)[1])
        yield Damage("a copy", [newer], lambda: (shutil.copytree(self.directory, newer), lambda: shutil.rmtree(newer))[1])

    def _content(self, contents: dict[Path, bytes], name: str) -> Damage:
        def do() -> Callable[[], object]:
            before = {path: path.read_bytes() for path in contents}
            write(contents)
            return lambda: write(before)

        return Damage(name, list(contents), do)

    def _directory(self, path: Path, data: bytes) -> Callable[[], object]:
        path.unlink()
        path.mkdir()
        return lambda: (path.rmdir(), path.write_bytes(data))


def write(contents: dict[Path, bytes]) -> None:
    for path, content in contents.items():
        path.write_bytes(content)


def sign(directory: Path, manifest: bytes) -> None:
    """Write a manifest with its digest."""
    (directory / store.MANIFEST).write_bytes(manifest)
    (directory / store.DIGEST).write_text(f"{hashlib.sha256(manifest).hexdigest()}  {store.MANIFEST}\n")


def whole(sweep: Sweep) -> Iterator[Damage]:
    """Every damage that is no flip."""
    return itertools.chain(sweep.cuts(), sweep.swaps(), sweep.from_elsewhere(), sweep.additions())


def main() -> int:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse, forged = (Sweep(Path(folder) / name, state) for name, state in (("a", small), ("b", large), ("c", small)))
        print("each byte:", dense(dense.flips(chance))(whole(dense)), flush=True)
        print("each 29th byte:", sparse(sparse.flips(chance, 29))(whole(sparse)), flush=True)
        print("each byte, forged:", forged(forged.forged(forged.flips(chance))), flush=True)
    return 1 if dense.bad or sparse.bad or forged.bad else 0


if __name__ == "__main__":
    sys.exit(main())
