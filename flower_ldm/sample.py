"""Draw images from a pipeline: `python -m flower_ldm.sample --pipeline results/flower-ldm`.

The pipeline is the output folder of `train_latent_diffusion.py`, or any repository on the Hub that `FlowerLDMPipeline`
loads. The command writes one PNG for each image, and `grid.png`.
"""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .errors import InputError, OneLineParser, exit_on_input_error, one_line, refusals_of_input
from .files import file_path, file_safe_name, fresh_folder, path_text, write_whole
from .images import MAX_IMAGE_PIXELS, open_image
from .lettering import drawable, pillow_font, wrapped
from .pipelines.pipeline_flower_ldm import NUM_INFERENCE_STEPS, SCHEDULERS, STRENGTH, upright_srgb
from .progress_bars import bar_options, progress_bar
from .sampling import SCHEDULER_HELP, check_sampling, load_pipeline

DEFAULT_NUM_LABELS = 10
GRID = "grid.png"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m flower_ldm.sample", description="Draw images from a pipeline.")
    # the model and the classes
    parser.add_argument("--pipeline", type=path_text, required=True, help="folder of a pipeline, or its id on the Hub")
    parser.add_argument(
        "--labels", nargs="+", help=f"class names or 0-based indices (default: the first {DEFAULT_NUM_LABELS} classes)"
    )
    parser.add_argument("--num_images", type=int, default=4, help="per label")
    parser.add_argument("--seed", type=int, default=0, help="image i, counted over all labels, has the seed SEED + i")
    # how it is drawn
    parser.add_argument("--num_inference_steps", "--steps", type=int, default=NUM_INFERENCE_STEPS)
    parser.add_argument("--guidance_scale", type=float, help="1 means off; unset: the pipeline's own")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, metavar=("BEGIN", "END"),
        help="part of the denoising in which guidance acts, as two fractions: 0 is pure noise, 1 the clean image; "
             "unset: the pipeline's own",
    )  # fmt: skip
    parser.add_argument(
        "--guidance_rescale", type=float, default=0.0, help="0 (off) to 1, reduces oversaturated colors"
    )
    parser.add_argument(
        "--guide",
        type=path_text,
        help="pipeline of a worse model of the same kind, a folder or Hub id; guidance leads away from its images",
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, help=SCHEDULER_HELP)
    # image to image and inpainting
    parser.add_argument("--image", type=file_path, help="picture to start from, cropped to its center")
    parser.add_argument(
        "--strength", type=float, default=STRENGTH, help="how much --image changes: above 0 (hardly) to 1 (completely)"
    )
    parser.add_argument(
        "--mask", type=file_path, help="picture of the image's size: white is redrawn, black or transparent is kept"
    )
    parser.add_argument("--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help="larger pictures are refused")
    # hardware
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, default=32, help="images drawn at once")
    # output
    parser.add_argument(
        "--output",
        type=file_path,
        default=Path("samples"),
        help="output folder; if it isn't empty, NAME-2, NAME-3 ... is created instead",
    )
    return parser.parse_args(argv)


def open_picture(flag: str, file: Path, max_pixels: int, background: str = "white") -> Image.Image:
    """A picture in sRGB and upright, its transparent pixels over `background`.

    Raises:
        InputError: it can't be read.
    """
    try:
        with open_image(file, max_pixels) as image:
            return upright_srgb(image, background)
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error and more
        raise InputError(f"{flag} {file} can't be read as a picture: {one_line(error)}") from error


def file_names(names: list[str]) -> list[str]:
    """A file name for each image from the name of its class: `<file-safe class name>_<n>.png`, each unique."""
    count: Counter[str] = Counter()
    files = []
    for name in names:
        stem = file_safe_name(name)
        # Case is ignored, since some file systems don't distinguish "Rose_0.png" from "rose_0.png".
        files.append(f"{stem}_{count[stem.lower()]}.png")
        count[stem.lower()] += 1
    return files


def label_grid(columns: list[list[Image.Image]], names: list[str], min_cell: int = 96, gap: int = 4) -> Image.Image:
    """A column of images for each label, with its name below. Images under `min_cell` pixels wide are enlarged."""
    width, height = columns[0][0].size
    scale = -(-min_cell // width)
    cell = (width * scale, height * scale)
    captions = [wrapped(drawable(name), cell[0] // 7) for name in names]
    caption_height = 16 * max(caption.count("\n") + 1 for caption in captions)
    grid_size = (
        len(columns) * (cell[0] + gap) + gap,
        len(columns[0]) * (cell[1] + gap) + gap + caption_height,
    )
    grid = Image.new("RGB", grid_size, "white")
    draw = ImageDraw.Draw(grid)
    for column, (images, caption) in enumerate(zip(columns, captions, strict=True)):
        left = gap + column * (cell[0] + gap)
        for row, image in enumerate(images):
            grid.paste(image.resize(cell, Image.Resampling.BICUBIC), (left, gap + row * (cell[1] + gap)))
        top = gap + len(images) * (cell[1] + gap)
        font = pillow_font(caption, 12)
        draw.multiline_text((left + cell[0] / 2, top), caption, "black", font, anchor="ma", align="center")
    return grid


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for flag, value in {"--num_images": args.num_images, "--batch_size": args.batch_size}.items():
        if not 1 <= value <= 100_000:
            raise InputError(f"{flag} must be from 1 to 100,000, got {value}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must be at least 0 and below 2**63, got {args.seed}")
    pipe = load_pipeline(args.pipeline, args.scheduler, args.device, args.dtype, args.guide)
    options = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "guidance_rescale": args.guidance_rescale,
        "image": None if args.image is None else open_picture("--image", args.image, args.max_image_pixels),
        "strength": args.strength,
        "mask_image": None if args.mask is None else open_picture("--mask", args.mask, args.max_image_pixels, "black"),
    }
    with refusals_of_input():
        labels = pipe.get_label_ids(args.labels or range(min(pipe.num_classes, DEFAULT_NUM_LABELS)))
    check_sampling(pipe, len(labels), options)

    labels_of_images = [label for label in labels for _ in range(args.num_images)]
    names = [pipe.class_names[label] for label in labels_of_images]
    files = file_names(names)
    folder = fresh_folder(args.output)
    pipe.set_progress_bar_config(**bar_options(desc="denoising", leave=False))
    images: list[Image.Image] = []
    with progress_bar(total=len(names), desc="sampling", unit="image") as progress:
        for start in range(0, len(names), args.batch_size):
            batch = range(start, min(start + args.batch_size, len(names)))
            # With one generator for each image, an image doesn't depend on the batch size.
            generators = [torch.Generator("cpu").manual_seed(args.seed + number) for number in batch]
            with refusals_of_input():  # some schedulers fail only at the end, with too few steps
                images += pipe([labels_of_images[number] for number in batch], generator=generators, **options).images
            for number in batch:
                write_whole(folder / files[number], partial(images[number].save, format="PNG"))
            progress.update(len(batch))

    columns = [images[start : start + args.num_images] for start in range(0, len(images), args.num_images)]
    write_whole(folder / GRID, partial(label_grid(columns, names[:: args.num_images]).save, format="PNG"))
    print(f"{len(images)} images and {GRID} are in {folder}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
