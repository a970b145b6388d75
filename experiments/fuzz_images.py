"""Throw damaged pictures at model.open_image: it may return an RGB image or raise ValueError, and nothing else.

    python -m experiments.fuzz_images [COUNT] [SEED]        100,000 files, some minutes on one core (2> /dev/null hides the decoders' lines)

Each file is a small valid picture with one to three damages: bytes changed, removed or repeated, a field of the header at its least or most, an
EXIF or TIFF tag mistyped. Every 50th is read from the disk, by a row of data. `damaged(samples(), SEED, NUMBER)` makes a file again.
"""
import argparse
import io
import random
import resource
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from model import open_image
from rollout import read_row


def samples() -> dict[str, bytes]:
    """A valid file of 24 x 16 pixels of every kind that this Pillow can write."""
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 4), dtype=np.uint8)).resize((24, 16))      # smooth: small files
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep, exif = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257), Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0, 0x8769: {0x9000: b"0220"}})      # orientation, maker, resolution, version
    kinds = {"png grey": (grey, "PNG", {}), "png rgb": (rgb, "PNG", {"exif": exif}), "png palette": (rgb.quantize(), "PNG", {"transparency": 0}),
             "png 16 bits": (deep, "PNG", {}), "jpeg turned": (rgb, "JPEG", {"exif": exif}),
             "jpeg progressive": (rgb, "JPEG", {"progressive": True, "exif": exif}), "jpeg cmyk": (rgb.convert("CMYK"), "JPEG", {}),
             "gif animated": (grey, "GIF", {"save_all": True, "append_images": [rgb, rgba]}), "webp lossy": (rgba, "WEBP", {"exif": exif}),
             "webp lossless": (rgb, "WEBP", {"lossless": True}), "avif": (rgb, "AVIF", {"exif": exif}), "bmp": (rgb, "BMP", {}),
             "ppm": (rgb, "PPM", {}), "pgm 16 bits": (deep, "PPM", {}), "tiff": (rgb, "TIFF", {"tiffinfo": {0x0112: 6}}),
             "tiff lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}), "tiff 16 bits": (deep, "TIFF", {"compression": "tiff_deflate"}),
             "tiff float": (grey.convert("F"), "TIFF", {}), "ico": (rgba, "ICO", {"sizes": [(24, 16)]}), "jpeg 2000": (rgb, "JPEG2000", {}),
             "tga": (rgba, "TGA", {"compression": "tga_rle"}), "pcx": (rgb, "PCX", {}), "dds": (rgba, "DDS", {}), "qoi": (rgba, "QOI", {})}
    Image.init()
    files = {kind: io.BytesIO() for kind, (_, name, _) in kinds.items() if name in Image.SAVE}
    for kind, file in files.items():
        kinds[kind][0].save(file, kinds[kind][1], **kinds[kind][2])
    return {kind: file.getvalue() for kind, file in files.items()}


def damage(data: bytearray, generator: random.Random) -> None:
    """Damage a file at random, in place."""
    how = generator.choice(("change", "remove or repeat", "remove or repeat", "header", "header", "tag", "tag"))
    start, size = generator.randint(0, len(data)), generator.choice((4, 40, len(data)))
    if how == "remove or repeat":       # to the end of the file, if it is all
        data[start:start + size] = data[start:start + size] * generator.choice((0, 2))
    elif how == "header":
        start, size, order = generator.randrange(100), generator.choice((1, 2, 4)), generator.choice(("little", "big"))
        data[start:start + size] = generator.choice((0, 1, 256 ** size // 2 - 1, 256 ** size // 2, 256 ** size - 1)).to_bytes(size, order)
    elif how == "tag" and (tags := max(data.find(b"II*\x00"), data.find(b"MM\x00*"))) >= 0:        # EXIF and TIFF have the same layout
        order = "little" if data[tags] == ord("I") else "big"
        field, size = generator.choice(((0, 2), (2, 2), (4, 4), (8, 4)))        # an entry's tag, type, count, value or where that is
        start = tags + 10 + 12 * generator.randrange(8) + field     # Pillow writes the entries there
        data[start:start + size] = generator.choice((*range(20), 255, 256, 0x0112, 65535)).to_bytes(size, order)
    else:
        data[start:start + 4] = generator.randbytes(4)


def damaged(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """A kind, and a file of it after one to three damages."""
    generator, kind = random.Random(f"{seed} {number}"), list(files)[number % len(files)]
    data, start = bytearray(files[kind]), 8
    for _ in range(generator.randint(1, 3)):
        damage(data, generator)
    while data.startswith(b"\x89PNG") and start + 12 <= len(data):      # with a wrong checksum Pillow would read no further
        end = start + 8 + int.from_bytes(data[start:start + 4], "big")
        data[end:end + 4] = zlib.crc32(data[start + 4:end]).to_bytes(4, "big")
        start = end + 4
    return kind, bytes(data)


def outcome(data: bytes, path: Path | None) -> str:
    """"opened", "refused", or what should not have happened. With a path: as training does, by a row of data that names it."""
    try:
        source = io.BytesIO(data)
        if path:
            path.write_bytes(data)
            [source] = read_row(b'{"question": "<image>?", "images": ["picture"]}', path.parent, None)["images"]
        image = open_image(source)
        return "opened" if image.mode == "RGB" and min(image.size) > 0 else f"{image.mode} of {image.size}"
    except ValueError:
        return "refused"
    except Exception as error:      # a finding
        return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"COUNT must be at least 1, not {args.count}")
    files, begun = samples(), time.perf_counter()
    calls, findings = {kind: [] for kind in files}, []      # of each kind: (seconds, number, outcome)
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(args.count), "fuzzing", disable=None):
            kind, data = damaged(files, args.seed, number)
            called = time.perf_counter()
            found = outcome(data, Path(folder, "picture") if number % 50 == 0 else None)
            calls[kind].append((time.perf_counter() - called, number, found))
    print("| kind | files | opened | refused | anything else | slowest call, ms (number) |\n|---|---|---|---|---|---|")
    for kind, rows in calls.items():
        wrong = [f"number {number}, {kind}: {found}" for _, number, found in rows if found not in ("opened", "refused")]
        opened, (seconds, number, _) = sum(row[2] == "opened" for row in rows), max(rows, default=(0, 0, ""))
        print(f"| {kind} | {len(rows)} | {opened} | {len(rows) - opened - len(wrong)} | {len(wrong)} | {1000 * seconds:.0f} ({number}) |")
        findings += wrong
    seconds, gigabytes = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{args.count:,} files, seed {args.seed}: {len(findings)} findings in {seconds:.0f} s, at most {gigabytes:.1f} GB")
    raise SystemExit("\n".join(findings[:20]) or 0)


if __name__ == "__main__":
    main()
