"""The image's versions are those of setup.py. The image itself is unbuilt."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_images_versions_come_from_setup_py(tmp_path):
    for name in ("setup.py", "docker/requirements.py"):
        (tmp_path / Path(name).name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "requirements.py", "gpu", "base", "image"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    versions = {line.partition("==")[2] for line in printed if line.startswith("transformer-engine")}
    assert len([line for line in printed if line.startswith("transformer-engine")]) == 3 and len(versions) == 1
    assert any(line.startswith("megatron-core==") for line in printed) and not any("[" in line for line in printed)


def test_the_dockerfile_names_no_version_and_no_digest_of_its_own():
    instructions = [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in instructions if "==" in line or "sha256:" in line]
    copied = [word for line in instructions if line.startswith("COPY") for word in line.split()[1:-1]]
    kept_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert all(f"!{name}" in kept_out for name in copied)
