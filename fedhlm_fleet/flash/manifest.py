"""A manifest for Raspberry Pi Imager: a list of images, from which a person picks one and writes it to a card.

The fields are those of Imager's os-list schema. `init_format` is "none", so that Imager does not replace our first-boot
files.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from fedhlm_fleet.flash.plan import FlashError

# Tags of the 64-bit models in Imager's device list.
DEVICES: Final = ("pi5-64bit", "pi4-64bit", "pi3-64bit")
_ICON: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40"><rect width="40" height="40" rx="8" fill="#234"/>'
    '<circle cx="13" cy="20" r="5" fill="#6cf"/><circle cx="28" cy="20" r="7" fill="none" stroke="#fc6" stroke-width="3"/></svg>'
)


def entry(image: Path, *, agent: str, cluster: str, made: datetime) -> dict[str, Any]:
    """Return an image as an entry of the list.

    Raises:
        FlashError: the image cannot be read.
    """
    try:
        with image.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = image.stat().st_size
    except OSError as exc:
        raise FlashError(f"cannot read {image}: {exc.strerror or exc}") from exc
    return {
        "name": f"FedHLM agent {agent}",
        "description": f"Raspberry Pi OS with the agent {agent} of cluster {cluster}",
        "icon": f"data:image/svg+xml;base64,{base64.b64encode(_ICON.encode()).decode()}",
        "url": image.resolve().as_uri(),
        "extract_size": size,
        "extract_sha256": digest,
        "image_download_size": size,
        "release_date": f"{made:%Y-%m-%d}",
        "init_format": "none",
        "architecture": "armv8",
        "devices": list(DEVICES),
    }


def write(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write the list; Imager opens files that end in .rpi-imager-manifest, or the one that --repo names.

    Raises:
        FlashError: the list cannot be written.
    """
    try:
        path.write_text(json.dumps({"os_list": list(entries)}, indent=2) + "\n", "utf-8")
    except OSError as exc:
        raise FlashError(f"cannot write {path}: {exc.strerror or exc}") from exc
