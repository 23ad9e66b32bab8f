"""Where the pictures of a scene lie: coloured tiles on a square canvas that do not overlap."""

from dataclasses import dataclass
from random import Random

from scene_names import KIND, Picture

COLOURS = {
    "red": (218, 41, 41),
    "yellow": (250, 207, 40),
    "green": (42, 160, 70),
    "blue": (45, 92, 222),
    "purple": (146, 60, 190),
    "black": (20, 20, 20),
}
SIDES = (128, 160, 192)  # pixels
TILE = {2: (0.36, 0.46), 3: (0.32, 0.42), 4: (0.28, 0.36), 5: (0.24, 0.31)}  # tiles -> their side / the canvas's side
GAP = 2  # pixels between tiles, and to the edge, at least
CLEAR = 1.5  # a relation is clear where one distance between centres is that many times the other
OUTERMOST = 0.06  # a tile is the outermost where its centre is that share of the canvas beyond the next one's

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Tile:
    """A picture on its coloured tile, a square. `box`: x1, y1, x2, y2 in pixels of the canvas; x2, y2 lie outside."""

    name: str
    picture: Picture
    colour: str
    box: tuple[int, int, int, int]

    @property
    def kind(self) -> str:
        return KIND[self.name]

    @property
    def area(self) -> int:
        return (self.box[2] - self.box[0]) ** 2

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """Tiles on a canvas of one pale colour, from the largest to the smallest."""

    side: int
    ground: tuple[int, int, int]
    tiles: tuple[Tile, ...]

    @property
    def names(self) -> dict[str, list[int]]:
        """Name -> the indices of its tiles, names of larger tiles first."""
        found: dict[str, list[int]] = {}
        for index, tile in enumerate(self.tiles):
            found.setdefault(tile.name, []).append(index)
        return found

    @property
    def singles(self) -> list[int]:
        """Indices of tiles whose name no other tile has."""
        return [indices[0] for indices in self.names.values() if len(indices) == 1]

    @property
    def kind(self) -> str:
        """The kind of picture that covers most of the canvas; of equals the one of the larger tile."""
        area = dict.fromkeys((tile.kind for tile in self.tiles), 0)
        for tile in self.tiles:
            area[tile.kind] += tile.area
        return max(area, key=lambda kind: area[kind])


@dataclass(frozen=True)
class Pool:
    """What scenes of a split are made of. Each scene holds one of the names in `required`, where there are any."""

    pictures: dict[str, list[Picture]]
    required: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(self.pictures)


def relation(first: Tile, second: Tile) -> tuple[str, bool]:
    """'left', 'right', 'above' or 'below': where the first is from the second; and whether it is clear."""
    across, down = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    side = ("left" if across < 0 else "right") if abs(across) > abs(down) else ("above" if down < 0 else "below")
    smaller, larger = sorted((abs(across), abs(down)))
    return side, larger >= CLEAR * smaller


def outermost(scene: Scene) -> dict[str, int]:
    """Direction -> the index of the tile that is clearly furthest there, for those whose name no other tile has."""
    found, singles = {}, scene.singles
    for axis, (low, high) in enumerate((("left", "right"), ("up", "down"))):
        along = sorted((tile.centre[axis], index) for index, tile in enumerate(scene.tiles))
        for direction, (end, index), (neighbour, _) in ((low, *along[:2]), (high, *along[:-3:-1])):
            if abs(end - neighbour) >= OUTERMOST * scene.side and index in singles:
                found[direction] = index
    return found


def arrange(random: Random, pool: Pool) -> Scene:
    """A scene of one name one to three times and one or two other names, a tile of each colour at most once.

    Some tile whose name no other has is clearly the outermost in some direction.
    """
    count, others = random.randint(1, 3), random.randint(1, 2)
    names = random.sample(pool.names, 1 + others)
    if pool.required and not set(names) & set(pool.required):
        names[random.randrange(len(names))] = random.choice(pool.required)
    pictures = []
    for name, times in zip(names, (count, 1, 1)[: len(names)], strict=True):
        few = pool.pictures[name]
        chosen = random.sample(few, times) if times <= len(few) else random.choices(few, k=times)
        pictures += [(name, picture) for picture in chosen]
    colours = random.sample(list(COLOURS), len(pictures))
    side = random.choice(SIDES)
    ground = (random.randint(225, 255), random.randint(225, 255), random.randint(225, 255))
    while True:
        boxes = place(random, side, len(pictures))
        tiles = [Tile(*picture, colour, box) for picture, colour, box in zip(pictures, colours, boxes, strict=True)]
        scene = Scene(side, ground, tuple(sorted(tiles, key=lambda tile: (-tile.area, tile.box))))
        if outermost(scene):
            return scene


def place(random: Random, side: int, count: int) -> list[tuple[int, int, int, int]]:
    """Squares inside the canvas, at least GAP pixels apart, in random order."""
    low, high = TILE[count]
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        # The largest first, while there is room.
        for size in sorted((round(side * random.uniform(low, high)) for _ in range(count)), reverse=True):
            room = side - size - 2 * GAP + 1
            for _ in range(20):
                x, y = GAP + int(random.random() * room), GAP + int(random.random() * room)
                box = (x, y, x + size, y + size)
                if not any(near(box, other) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == count:
            random.shuffle(boxes)
            return boxes


def near(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two boxes overlap or are less than GAP pixels apart, along both axes."""
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP
