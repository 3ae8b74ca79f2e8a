"""The weights of a Hugging Face folder: safetensors, one file or several with an index, read tensor by tensor."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from megatron_groupdpo.convert.hf.folder import INDEX, WEIGHTS
from megatron_groupdpo.convert.tensors.megatron_names import Shape
from megatron_groupdpo.errors import CheckpointError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    file: Path
    shape: Shape
    dtype: str
    """As safetensors spells it."""
    joined: tuple[str, int, int] | None = None
    """Of a part of a joined tensor: that one's name, the expert, and the part's first row."""


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a folder that holds one (and, as the caller knows, no model that can be read)."""
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        raise CheckpointError(
            f"{path} is or holds a GGUF file, made for inference and most often quantized; give the folder of the "
            "original model, with safetensors"
        )


class HfWeights:
    """All tensors of a folder by name. Only what is asked for is read, and nothing stays in memory."""

    def __init__(self, folder: Path, *, joined: Mapping[str, tuple[str, ...]] | None = None) -> None:
        """Open every file and read its header.

        Args:
            folder: of a Hugging Face model.
            joined: see :class:`Family`; parts of such tensors take their place here.

        Raises:
            CheckpointError: no safetensors, a missing or corrupt file, an index that does not fit the files.
        """
        self.folder = folder
        self._opened: tuple[Path, Any] | None = None
        self._places = self._read_index(folder / INDEX) if (folder / INDEX).exists() else self._read_single()
        for ending, parts in (joined or {}).items():
            self._take_apart(ending, parts)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, names: set[str]) -> torch.dtype:
        """The dtype of the named tensors: their common one; float32 for several, which holds each exactly.

        Raises:
            CheckpointError: a tensor is not of floating point numbers (quantized, for example).
        """
        found = set(self.dtypes(names).values())
        return found.pop() if len(found) == 1 else torch.float32

    def dtypes(self, names: set[str]) -> dict[str, torch.dtype]:
        """The dtype of each of the named tensors.

        Raises:
            CheckpointError: as :meth:`dtype`.
        """
        found = {}
        for name in sorted(names):
            dtype = self._places[name].dtype
            if dtype not in _DTYPES or dtype == "F64":
                raise CheckpointError(
                    f"{self._places[name].file}: tensor {name!r} is of type {dtype}; only F32, F16 and BF16 can be "
                    "converted. Save the model in one of them"
                )
            found[name] = _DTYPES[dtype]
        return found

    def read(self, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or a window of it, in host memory; of the rows outside the window nothing is read."""
        place = self._places[name]
        try:
            opened = self._open(place.file)
            if place.joined is not None:
                whole, expert, first = place.joined
                rows = range(first, first + place.shape[0])[window[0] if window else slice(None)]
                inside = (slice(expert, expert + 1), slice(rows.start, rows.stop), *window[1:])
                return opened.get_slice(whole)[inside][0]
            return opened.get_slice(name)[window] if window else opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{place.file}: tensor {name!r} cannot be read ({error}); get the file again"
            ) from None

    def label(self, name: str) -> str:
        """The name for messages; of a part, also the tensor that the file has."""
        joined = self._places[name].joined
        return repr(name) if joined is None else f"{name!r} (a part of {joined[0]!r})"

    def _take_apart(self, ending: str, parts: tuple[str, ...]) -> None:
        for name, whole in list(self._places.items()):
            if not name.endswith(ending) or len(whole.shape) != 3:
                continue
            del self._places[name]
            experts, rows, columns = whole.shape
            size = rows // len(parts)
            for expert, number in itertools.product(range(experts), range(len(parts))):
                part = name.removesuffix(ending) + parts[number].format(expert=expert)
                if part in self._places:
                    raise CheckpointError(f"{self.folder} holds both {name!r} and its part {part!r}; remove one")
                # an odd row goes to the last part, whose shape is then refused
                shape = (size if number < len(parts) - 1 else rows - number * size, columns)
                self._places[part] = replace(whole, shape=shape, joined=(name, expert, number * size))

    def _open(self, file: Path) -> Any:
        """One file is open at a time: a large model has more than a process may have open."""
        if self._opened is None or self._opened[0] != file:
            try:
                # pread: pages of a mapped file would count as this process's memory until it is closed
                self._opened = file, safe_open(file, framework="pt", device="cpu", backend="pread")
            except FileNotFoundError:
                raise CheckpointError(f"{file} is missing, though {INDEX} names it; get the model again") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is not a whole safetensors file ({error}); get it again") from None
        return self._opened[1]

    def _header(self, file: Path) -> dict[str, _Place]:
        opened = self._open(file)
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: _Place(file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype())
            for name, part in slices.items()
        }

    def _read_index(self, index: Path) -> dict[str, _Place]:
        try:
            weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            files = {file: Path(file) for file in weight_map.values()}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files ({error}); get it again") from None
        for file, path in files.items():
            if path.name != file:
                raise CheckpointError(f"{index} names {file!r}, which is not a file of this folder; get it again")
        headers = {file: self._header(self.folder / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise CheckpointError(f"{self.folder / file} lacks the tensor {name!r}, though {INDEX} places it there")
        # the files' other tensors too: one that the index forgot would change the model
        return {name: place for header in headers.values() for name, place in header.items()} | {
            name: headers[file][name] for name, file in weight_map.items()
        }

    def _read_single(self) -> dict[str, _Place]:
        if (self.folder / WEIGHTS).exists():
            return self._header(self.folder / WEIGHTS)
        refuse_gguf(self.folder)
        if any(self.folder.glob("*.bin")):
            raise CheckpointError(
                f"{self.folder} holds its weights as .bin files, which can run code when read; write them as "
                "safetensors first: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise CheckpointError(f"{self.folder} holds neither {WEIGHTS} nor {INDEX}; give the folder of a whole model")


@contextmanager
def byte_bar(what: str, total: int, *, quiet: bool = False) -> Iterator[Any]:
    """A bar over ``total`` bytes; call its ``update`` with what was done."""
    with tqdm(
        total=total, desc=what, unit="B", unit_scale=True, delay=2.0, mininterval=1.0, leave=False, disable=quiet
    ) as bar:
        yield bar
