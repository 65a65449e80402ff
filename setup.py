"""swiftlite's package. Dependencies live in requirements/*.txt, their single source."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    found: list[str] = []
    for line in lines:
        if line.startswith("-r "):
            found += requirements(line[3:].strip().removesuffix(".txt"))
        elif line.strip():
            found.append(line.strip())
    return found


setup(
    name="swiftlite",
    version="0.1.0",
    description="Fine-tune a language model and serve it, from one small framework",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["swiftlite", "swiftlite.*"], exclude=["swiftlite.swift"]), "swift"],
    package_dir={"swift": "swiftlite/swift"},
    package_data={"swiftlite": ["data/*.jsonl", "models/tiny_chat/*", "kernels/*.cpp", "kernels/*.h"]},
    install_requires=requirements("base"),
    extras_require={name: requirements(name) for name in ("ui", "vllm", "ray", "test")},
    entry_points={"console_scripts": ["swift=swiftlite.cli:main", "swiftlite=swiftlite.cli:main"]},
)
