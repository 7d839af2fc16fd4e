"""Install xmoe: `pip install -e .`, or `make quickstart`, which does all of it.

The C kernels are built here where a C compiler is; without one the install says so in a line and PyTorch serves alone.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

HERE = Path(__file__).parent


def build_c_kernels(target: Path) -> None:
    """Compile xmoe/kernels/cpu/*.c into a shared library in `target`; never fails the install."""
    build = runpy.run_path(str(HERE / "xmoe" / "kernels" / "cpu" / "build.py"))["build"]
    try:
        print(f"C kernels: {build(target).name}")
    except (RuntimeError, OSError) as error:
        print(f"C kernels were not built, PyTorch serves in their place: {str(error).splitlines()[0]}")


class BuildPy(build_py):
    """Adds the library to the wheel; for an editable install it lands beside its source."""

    def run(self):
        super().run()
        editable = getattr(self, "editable_mode", False)
        build_c_kernels(
            HERE / "xmoe" / "kernels" / "cpu" if editable else Path(self.build_lib) / "xmoe" / "kernels" / "cpu"
        )


class Develop(develop):
    """The older way of an editable install."""

    def run(self):
        super().run()
        build_c_kernels(HERE / "xmoe" / "kernels" / "cpu")


setup(
    name="xmoe",
    version="0.1.0",
    description="Train, open, watch, shrink, talk to and measure Mixture-of-Experts language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["xmoe", "xmoe.*", "evaluation"]),
    package_data={"xmoe.kernels.cpu": ["*.c", "*.h"], "xmoe.kernels.cuda": ["tiles/*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tokenizers>=0.20",
        "datasets>=3.0",
        "safetensors>=0.5",
        "pyyaml>=6.0",
        "wandb>=0.18",
        "tqdm>=4.66",
        "numpy>=1.26",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "transformers>=5.17",
            "tiktoken>=0.8",
        ],
        "report": ["matplotlib>=3.8"],
        "hub": ["huggingface_hub>=0.26"],
        "eval": ["lm-eval==0.4.13", "transformers>=5.17", "accelerate>=1.0"],
        "modal": ["modal>=0.70"],
    },
    cmdclass={"build_py": BuildPy, "develop": Develop},
)
