"""A folder of Hugging Face's form, tensor by tensor."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ngpt.config.errors import ConfigError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
EXACT = {"F32", "BF16", "F16"}  # what fp32 holds exactly
_AN_EXPERT = re.compile(r"(.+\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")  # as Nemotron-H is published
_BUFFER = re.compile(r".+\.rotary_emb\.inv_freq")  # older releases wrote it; it follows from the config
_AGAIN = "Copy the folder again"


class Folder:
    """config.json and the tensors of the weight files beside it. Reading a tensor takes memory for that tensor alone.

    Names are those of transformers' classes, whichever of its two forms Nemotron-H has on the disk.

    Attributes:
        names: of all tensors.

    Raises:
        ConfigError: a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = _read_json(self.path / "config.json", "A folder with config.json and *.safetensors is needed")
        self._places: dict[str, list[tuple[Any, str]]] = {}  # name -> the open file and the name in it; separate experts in order
        experts: dict[str, dict[int, tuple[Any, str]]] = {}
        for file in self._files():
            for name in file.keys():  # noqa: SIM118
                ours = re.sub(r"^backbone\.", "model.", name)
                if expert := _AN_EXPERT.fullmatch(ours):
                    experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = (file, name)
                elif not _BUFFER.fullmatch(name):
                    self._places[ours] = [(file, name)]
        for name, each in experts.items():
            self._places[name] = [each[number] for number in range(len(each)) if number in each]
            if len(self._places[name]) < len(each):
                raise self._refusal(f"{name} of {len(each)} experts, not numbered from 0", "Every expert is there")
        self._stacked = set(experts)

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def _files(self) -> list[Any]:
        index = self.path / INDEX
        if index.exists():
            wanted = _read_json(index, "It says which file holds which tensor").get("weight_map", {})
        elif (self.path / WHOLE).exists():
            wanted = {"": WHOLE}
        else:
            other = next((path.name for path in sorted(self.path.glob("pytorch_model*"))), "no *.safetensors")
            raise ConfigError(str(self.path), other, f"Weights are read from {WHOLE}", "Save the model with safetensors")
        opened = {}
        for name in sorted(set(wanted.values())):
            path = self.path / name
            try:
                opened[name] = safe_open(path, "pt")
            except FileNotFoundError:
                raise ConfigError(str(path), "missing", f"{INDEX} names it", _AGAIN) from None
            except (SafetensorError, OSError) as error:
                raise ConfigError(str(path), error, "It must be a whole safetensors file", _AGAIN) from error
        lost = next((name for name, file in wanted.items() if name and name not in opened[file].keys()), None)  # noqa: SIM118
        if lost is not None:
            raise ConfigError(str(self.path / wanted[lost]), f"no {lost}", f"{INDEX} says that it is there", _AGAIN)
        return list(opened.values())

    def check_names(self, expected: Iterable[str], tied: bool) -> None:
        """Raises ConfigError where a tensor of the model is missing, or one is there that the model has no place for.

        Args:
            tied: the output matrix is the embedding. If the folder has it nevertheless, it must be equal.
        """
        expected = set(expected)
        missing, spare = sorted(expected - self.names), sorted(self.names - expected)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self._refusal(f"no {missing[0]}{more}", "The model of its config.json has this tensor", _AGAIN)
        if tied and spare == ["lm_head.weight"]:
            embedding = next(name for name in ("model.embeddings.weight", "model.embed_tokens.weight") if name in expected)
            if not torch.equal(self.read("lm_head.weight"), self.read(embedding)):
                rule, way_out = f"config.json ties it to {embedding}, and they differ", "Set tie_word_embeddings to false there"
                raise self._refusal("lm_head.weight", rule, way_out)
        elif spare:
            more = f" and {len(spare) - 1} more" if len(spare) > 1 else ""
            raise self._refusal(f"{spare[0]}{more}", "The model of its config.json has no such tensor", "Correct config.json")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Experts that lie apart count as one tensor."""
        sizes = {tuple(file.get_slice(stored).get_shape()) for file, stored in self._places[name]}
        if len(sizes) > 1:
            raise self._refusal(f"{name} of several sizes: {sorted(sizes)}", "Experts are equally wide")
        (size,) = sizes
        return (len(self._places[name]), *size) if name in self._stacked else size

    def read(self, name: str) -> Tensor:
        """The whole tensor in fp32, exactly.

        Raises:
            ConfigError: fp32 cannot hold its numbers, or the file cannot be read.
        """
        parts = []
        for file, stored in self._places[name]:
            dtype = file.get_slice(stored).get_dtype()
            if dtype not in EXACT:
                raise self._refusal(f"{name} in {dtype}", f"fp32 holds {', '.join(sorted(EXACT))} exactly", "Save it as one of these")
            try:
                parts.append(file.get_tensor(stored).float())
            except (SafetensorError, OSError) as error:
                raise self._refusal(f"{name}: {error}", "A weight file is read whole", _AGAIN) from error
        return torch.stack(parts) if name in self._stacked else parts[0]

    def check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        """Raises ConfigError where a tensor has another shape than the model of the config has."""
        if (found := self.shape(name)) != wanted:
            rule = f"The model of its config.json has {list(wanted)}"
            raise self._refusal(f"{name} has the shape {list(found)}", rule, "Correct config.json")

    def _refusal(self, got: str, rule: str, way_out: str = _AGAIN) -> ConfigError:
        return ConfigError(str(self.path), got, rule, way_out)


def _read_json(path: Path, rule: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), object_hook=_number)
    except FileNotFoundError:
        raise ConfigError(str(path), "missing", rule, "Name a folder that holds one") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), error, "It must be JSON", _AGAIN) from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), "not an object", rule, _AGAIN)
    return content


def _number(content: dict[str, Any]) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    return float(content["__float__"]) if content.keys() == {"__float__"} else content
