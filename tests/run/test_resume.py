"""The weights that model.init reads from a file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddp_cifar.errors import UserError
from ddp_cifar.run.resume import STATE_DICT_KEYS, load_init

WEIGHTS = {"head.weight": torch.rand(2, 3)}


@pytest.mark.parametrize("key", STATE_DICT_KEYS)
def test_a_state_dict_is_found_under_the_keys_that_scripts_use(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: WEIGHTS}, path := tmp_path / "weights.pt")
    assert torch.equal(load_init(str(path))["head.weight"], WEIGHTS["head.weight"])


def test_a_bare_state_dict_and_safetensors_are_read(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "bare.pt")
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    for name in ("bare.pt", "weights.safetensors"):
        assert torch.equal(load_init(str(tmp_path / name))["head.weight"], WEIGHTS["head.weight"])


def test_what_has_no_weights_is_described(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "params": {"a": 1}}, path := tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt has no weights: found a dict with the keys epoch, params; expected"):
        load_init(str(path))
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_init(str(tmp_path / "broken.safetensors"))
