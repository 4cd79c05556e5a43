"""Writes constraints.txt from the running environment: versions only, no hosts, no local packages."""

from importlib import metadata
from pathlib import Path

HEADER = "# The exact versions that the tests and benchmarks were last run with. Regenerate: make constraints\n"


def main() -> None:
    pins = {d.metadata["Name"].lower().replace("_", "-"): d.version.split("+")[0] for d in metadata.distributions()}
    for tool in ("prefkern", "pip", "uv", "setuptools"):
        pins.pop(tool, None)
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    Path(__file__).parent.parent.joinpath("constraints.txt").write_text(HEADER + "".join(lines))
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
