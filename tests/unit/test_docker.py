"""The image's versions are those of setup.py and of the constraints. The image itself is unbuilt."""

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def requirements(folder: Path, *groups: str) -> list[str]:
    for name in ("setup.py", "docker/requirements.py"):
        (folder / Path(name).name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "requirements.py", *groups]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_images_versions_come_from_setup_py(tmp_path):
    printed = requirements(tmp_path, "gpu", "base", "image")
    versions = {line.partition("==")[2] for line in printed if line.startswith("transformer-engine")}
    assert len([line for line in printed if line.startswith("transformer-engine")]) == 3 and len(versions) == 1
    assert any(line.startswith("megatron-core==") for line in printed) and not any("[" in line for line in printed)


def test_the_constraints_name_a_version_of_every_requirement_that_fits_it(tmp_path):
    pins = [Requirement(line) for line in (ROOT / "docker/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins) and not any(pin.url for pin in pins)  # a path of some machine is a URL
    for requirement in map(Requirement, requirements(tmp_path, "base", "wandb", "dev")):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)


def test_the_dockerfile_names_no_version_and_no_digest_of_its_own():
    instructions = [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in instructions if "==" in line or "sha256:" in line]
    copied = [word for line in instructions if line.startswith("COPY") for word in line.split()[1:-1]]
    kept_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert all(f"!{name}" in kept_out for name in copied)
