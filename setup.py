# The check comes first and everything here parses on any Python 3: an older one gets this line from pip instead of an old Megatron.
import sys

if sys.version_info < (3, 12):
    message = "ngpt-megatron needs Python 3.12 or newer, this is %d.%d. Install one and use it, for instance: make PYTHON=python3.12"
    sys.exit(message % sys.version_info[:2])

import json
import os
import re
import subprocess

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = os.path.dirname(os.path.abspath(__file__)) if "__file__" in globals() else os.getcwd()
COMMIT_FILE = os.path.join("ngpt", "commit.json")  # launch/provenance.py reads it where there is no checkout


def git(*arguments):
    """Output of a git command about this folder; None where git is missing or refuses."""
    try:
        return subprocess.check_output(("git",) + arguments, cwd=HERE, stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit():
    """Which commit these sources are of: git's word, or NGPT_COMMIT; None: the archive that they come from may have brought a file."""
    top = git("rev-parse", "--show-toplevel")
    if top and os.path.samefile(top, HERE):
        status = git("status", "--porcelain")
        return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
    if os.environ.get("NGPT_COMMIT"):
        told, _, dirty = os.environ["NGPT_COMMIT"].partition("-")
        return {"commit": told, "dirty": bool(dirty)}
    return None


def record(known, folder):
    """Writes what is known of the commit into a built folder."""
    if known is None:
        return
    with open(os.path.join(folder, COMMIT_FILE), "w") as stream:
        json.dump(known, stream)


class BuildWithCommit(build_py):
    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            record(commit(), self.build_lib)


class ArchiveWithCommit(sdist):
    def make_release_tree(self, base_dir, files):
        known = commit()  # before the tree is made, which lies in the checkout
        tracked = (git("ls-files", "-z") or "").split("\0")  # tests, pages and tools, too
        super().make_release_tree(base_dir, sorted(set(files).union(filter(os.path.isfile, tracked))))
        record(known, base_dir)


def long_description():
    """README.md with its links into the repository as text: a registry's page has no repository around it."""
    path = os.path.join(HERE, "README.md")
    if not os.path.exists(path):  # only the requirements are read (docker/requirements.py)
        return ""
    with open(path, encoding="utf-8") as stream:
        return re.sub(r"\[([^][]+)\]\((?!https?://)([^()]+)\)", r"\1 (\2)", stream.read())


WANDB = "wandb>=0.30,<1"  # earlier ones wait for a server that does not answer, whatever their time limits
TEKKEN = ["mistral-common>=1.13,<2"]  # ships the 131,072-entry vocabulary of tokenizer=tekken
S3, GS, HTTP = ["s3fs>=2024.6"], ["gcsfs>=2024.6"], ["aiohttp>=3.9,<4"]  # texts by URL; hf:// needs none of them
CODE = ["ngpt", "ngpt.*", "megatron_ext", "megatron_ext.*"]

setup(
    name="ngpt-megatron",
    version="0.1.0",
    description="Pretraining of normalized transformers (nGPT) on Megatron-core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The ngpt developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["pretraining", "transformer", "nGPT", "NVFP4", "Megatron"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.12",
    # conf/ and launch/ stand at the top level for people to read, and are installed inside the package: others have a `launch`, too.
    packages=find_packages(include=CODE) + ["ngpt." + name for name in ["conf"] + find_packages(include=["launch", "launch.*"])],
    package_dir={"ngpt.conf": "conf", "ngpt.launch": "launch"},
    package_data={
        "ngpt": ["**/*.j2", "**/*.md", "evaluation/tasks/*", "py.typed", "commit.json"],
        "ngpt.conf": ["**/*.yaml", "*.md"],
        "megatron_ext": ["*.md", "py.typed"],
        "ngpt.launch": ["*.md", "*.sh"],
        "ngpt.launch.commands": ["completion.*sh"],
        "ngpt.launch.slurm": ["*.sbatch"],
    },
    cmdclass={"build_py": BuildWithCommit, "sdist": ArchiveWithCommit},
    entry_points={"console_scripts": ["ngpt = ngpt.launch.cli:main"]},
    install_requires=[
        # Exact: the plug-ins rely on details of these that move between minor versions.
        "megatron-core==0.19.2",
        "hydra-core==1.3.8",
        "omegaconf==2.3.1",
        # a0: NVIDIA's images name their build of 2.11 2.11.0a0, which sorts before 2.11.0.
        "torch>=2.11.0a0,<2.12",
        "einops>=0.8,<1",  # Megatron's Mamba mixer imports it and does not declare it
        "fsspec>=2024.6",  # no upper bound: s3fs and gcsfs pin it to their own version
        "huggingface_hub>=0.34,<3",
        "jinja2>=3.1,<4",
        "matplotlib>=3.10,<4",  # from the first whose artists tell the outermost figure
        "numpy>=2.1,<3",  # from the one in NVIDIA's images on
        "psutil>=6,<8",  # Megatron's distributed checkpoints import it and do not declare it
        "pyarrow>=18,<27",
        "pyyaml>=6,<7",
        "safetensors>=0.7,<1",
        "shtab>=1.10,<2",  # completion of bash and zsh, from the first that takes choices of any container
        "sentencepiece>=0.2.3,<1",  # earlier ones crash on a damaged model
        "tensorboard>=2.18,<3",
        "tiktoken>=0.8,<1",
        "tokenizers>=0.23,<1",
        "tqdm>=4.66,<5",
        "transformers>=5.20.2,<6",  # exports open in it, and generation is its own
        "xxhash>=3.4,<5",  # hashes of checkpoint files: finds damage at tens of GB/s, where SHA-256 would take longer than the save
        "zstandard>=0.22,<1",
    ],
    extras_require={
        # Needs nvcc. NVIDIA's apex is optional and not on the registry (`apex` there is another project): Megatron takes Adam from
        # Transformer Engine where it is installed, then from apex, then from torch.
        "gpu": [
            "transformer-engine[core_cu13,pytorch]==2.20.2",
            "mamba-ssm==2.3.2.post1",
            "causal-conv1d==1.7.0",
        ],
        # What Transformer Engine declares and an installation without dependencies (docker/Dockerfile) leaves out.
        "image": ["nvdlfw-inspect==0.2.2", "nvidia-cudnn-frontend>=1.29,<2", "onnxscript>=0.7,<0.8"],
        "data": TEKKEN + S3 + GS + HTTP,  # what `ngpt data` can be asked for beyond files, the Hub and vocabularies of one's own
        "tekken": TEKKEN,
        "hf": [],  # export, import and generate need no more than what is installed anyway
        "eval": ["lm-eval[hf]>=0.4.13,<0.5"],  # tasks of `ngpt eval` and train.eval_tasks
        "wandb": [WANDB],
        "s3": S3,
        "gs": GS,
        "http": HTTP,
        "dev": ["hypothesis>=6.170,<7", "mypy>=2.4.1,<2.5", "pytest>=9.2,<10", "pytest-xdist>=3.8,<4", "ruff>=0.17,<0.18", WANDB],
    },
)
