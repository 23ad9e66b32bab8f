"""Draw one scene with what its record says: `python examples/scenes/picture.py --output examples/scenes/scene.png`."""

import argparse
from pathlib import Path
from typing import Any

from build import PAIRS, pool_of, render, scenes
from PIL import Image, ImageDraw, ImageFont
from scene_layout import Scene

SCALE = 3
WIDTH = 920
LINE = 21


def draw(scene: Scene, record: dict[str, Any]) -> Image.Image:
    """The scene, enlarged, with its boxes; beside and below it the record's words."""
    font = ImageFont.load_default(size=15)
    side = scene.side * SCALE
    page = Image.new("RGB", (WIDTH, side + 4 * LINE), "white")
    page.paste(render(scene).resize((side, side), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(page)
    for index, thing in enumerate(record["objects"]):
        box = [SCALE * number for number in thing["box"]]
        pen.rectangle(box, outline="magenta", width=2)
        label = f"{index} {thing['name']}, {', '.join(thing['attributes'])}"
        pen.rectangle(pen.textbbox((box[0] + 2, box[1] + 2), label, font=font), fill="white")
        pen.text((box[0] + 2, box[1] + 2), label, "magenta", font=font)
    lines = ["questions, answers"]
    lines += [f"    {asked['question']}   {', '.join(asked['answers'])}" for asked in record["questions"]]
    for question, choices, right in (
        (record["question"], "choices", "answer_index"),
        ("why?", "rationale_choices", "rationale_index"),
    ):
        lines += ["", question]
        lines += [
            f"  {'> ' if number == record[right] else '   '} {choice}" for number, choice in enumerate(record[choices])
        ]
    lines += ["", "text, label", f"    {record['text']}   {record['label']}"]
    for number, line in enumerate(lines):
        pen.text((side + 20, 8 + LINE * number), line, "black", font=font)
    caption = record["caption"]
    pen.text((8, side + 8), f"caption: {caption}", "black", font=font)
    phrases = [f"{caption[slice(*phrase['span'])]!r} {phrase['objects']}" for phrase in record["phrases"]]
    pen.text((8, side + 8 + LINE), f"phrases: {'   '.join(phrases)}", "black", font=font)
    pen.text((8, side + 8 + 2 * LINE), f"category: {record['category']}", "black", font=font)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--scene", type=int, default=0, help="number of a scene of val")
    options = parser.parse_args()
    start = options.scene - options.scene % 2
    _, scene, record = list(scenes("val", pool_of("val", PAIRS), start, start + 2))[options.scene % 2]
    draw(scene, record).quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
