"""The package. `kernels/` is installed as `mae_fast.kernels`: its bare name is another project's.

The tests have passed with the floors of triton, numpy, av, safetensors, rich, tyro, matplotlib,
pyarrow and the pytest family, beside torch 2.13; the other floors are not tested yet.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

DEPENDENCIES = [
    "torch>=2.11",
    'triton>=3.6; sys_platform == "linux" and platform_machine in "x86_64 aarch64"',
    "numpy>=1.26",
    "av>=17.1",
    "safetensors>=0.5",
    "rich>=13",
    "tyro>=0.9.2",
    "matplotlib>=3.8",
    'tomli>=2; python_version < "3.11"',
]
EXTRAS = {
    # Each torchcodec release loads with one torch release only: `mae-fast info` says if it does.
    "torchcodec": ["torchcodec>=0.12"],
    "flash-attn": ["flash-attn>=2.8"],
    # Only pre-releases exist; naming one lets pip choose them.
    "flash-attn-4": ["flash-attn-4>=4.0.0b1"],
    "xformers": ["xformers>=0.0.35"],
    "tensorboard": ["tensorboard>=2.15"],
    "wandb": ["wandb>=0.18"],
    # pyarrow 17 installs a top-level `benchmarks`, which hides ours from the tests.
    "parquet": ["pyarrow>=18.1"],
    "dev": [
        "build>=1.2",
        "hypothesis>=6.100",
        "pyarrow>=18.1",
        "pytest>=8",
        "pytest-benchmark>=4",
        "pytest-xdist>=3.5",
        "ruff>=0.12",
        "setuptools>=70.1",
        "transformers>=4.57",
    ],
}

HERE = Path(__file__).parent
VERSION = re.search('__version__ = "(.+)"', (HERE / "mae_fast/__init__.py").read_text())[1]

setup(
    name="mae-fast",
    version=VERSION,
    description="A training engine for video masked autoencoders (MAE-ST): exact and fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The mae_fast authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["mae_fast", "mae_fast.*"]), "mae_fast.kernels"],
    package_dir={"mae_fast.kernels": "kernels"},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mae-fast = mae_fast.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
