"""Print the rooms of the three packages: modules, lines, and who imports whom.

python -m tests.rooms            # this checkout
python -m tests.rooms FOLDER     # another one
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("capt_deploy", "capt_train", "export")


@dataclass
class Package:
    """The rooms of one package; a module beside the rooms counts as a room of its own."""

    modules: Counter[str] = field(default_factory=Counter)  # by folder
    lines: int = 0
    arrows: Counter[tuple[str, str]] = field(default_factory=Counter)  # imports between rooms

    def circles(self) -> list[tuple[str, str]]:
        """Return the pairs of rooms that import each other, directly or through others."""
        below = {room: set(self._reached(room)) for room, _ in self.arrows}
        return sorted(
            (one, other)
            for one, seen in below.items()
            for other in seen
            if one < other and one in below.get(other, ())
        )

    def floors(self) -> dict[str, int]:
        """Return each room's floor: 0 imports no other room; only without circles."""
        targets: Mapping[str, set[str]] = defaultdict(set)
        for room, other in self.arrows:
            targets[room].add(other)
        rooms = {room for arrow in self.arrows for room in arrow}
        heights: dict[str, int] = {}

        def height(room: str) -> int:
            if room not in heights:
                heights[room] = max((1 + height(other) for other in targets[room]), default=0)
            return heights[room]

        return {room: height(room) for room in rooms}

    def _reached(self, start: str) -> Iterator[str]:
        seen, waiting = set(), [start]
        while waiting:
            room = waiting.pop()
            for source, target in self.arrows:
                if source == room and target not in seen:
                    seen.add(target)
                    waiting.append(target)
                    yield target


def read_packages(root: Path) -> dict[str, Package]:
    """Measure the three packages below `root`."""
    modules = {
        module_name(file.relative_to(root)): file
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    }
    packages = {name: Package() for name in PACKAGES}
    for module, file in modules.items():
        package = packages[module.split(".")[0]]
        source = file.read_text()
        package.lines += len(source.splitlines())
        if file.name != "__init__.py":
            package.modules[file.parent.relative_to(root).as_posix()] += 1
        for target in imports(ast.parse(source), modules):
            same_package = target.split(".")[0] == module.split(".")[0]
            rooms = room_of(module, file), room_of(target, modules[target])
            if same_package and rooms[0] != rooms[1] and "" not in rooms:
                package.arrows[rooms] += 1
    return packages


def module_name(file: Path) -> str:
    """Return the dotted name of a module's file."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str, file: Path) -> str:
    """Return a module's room: the folder below its package; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that a syntax tree imports, lazily or at the top."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                target = name if name in modules else node.module
                if target in modules:
                    yield target
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)


def main() -> None:
    """Print a table for each package."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    packages = read_packages(root)
    for name, package in packages.items():
        circles = package.circles()
        print(
            f"{name}: {sum(package.modules.values())} modules, {package.lines} lines, "
            f"{sum(package.arrows.values())} arrows between rooms, {len(circles)} circles"
        )
        for folder, count in sorted(package.modules.items()):
            print(f"  {count:3} modules in {folder}/")
        if circles:
            print(f"  circles: {', '.join(f'{one} <-> {other}' for one, other in circles)}")
            continue
        floors = package.floors()
        for floor in sorted(set(floors.values()), reverse=True):
            rooms = sorted(room for room, level in floors.items() if level == floor)
            print(f"  floor {floor}: {', '.join(rooms)}")
    print(f"product: {sum(package.lines for package in packages.values())} lines")


if __name__ == "__main__":
    main()
