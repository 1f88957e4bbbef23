"""A model folder -> one GGUF file, by llama.cpp's own converter."""

import shutil
import subprocess
import sys
from pathlib import Path

from rayfuse.config.base import UserError
from rayfuse.config.text import show_on_one_line

CONVERTER = "convert_hf_to_gguf.py"


def find_converter() -> str:
    """Find the converter of llama.cpp on PATH.

    Raises:
        UserError: It is not there.
    """
    path = shutil.which(CONVERTER)
    if path is None:
        raise UserError(
            f"--gguf needs {CONVERTER} of llama.cpp on PATH: clone llama.cpp, "
            "`pip install -r requirements/requirements-convert_hf_to_gguf.txt` there, and add its "
            "folder to PATH; or omit --gguf"
        )
    return path


def convert_model(converter: str, model: Path, outfile: Path) -> None:
    """Convert a model folder; the file has the weights' own dtype, or float16.

    Args:
        converter: The path of `convert_hf_to_gguf.py`.
        model: The folder.
        outfile: The file to write.

    Raises:
        UserError: The converter fails, as it does for families that llama.cpp lacks.
    """
    command = [sys.executable, converter, str(model), "--outfile", str(outfile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not outfile.is_file():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = show_on_one_line(lines[-1]) if lines else f"exit code {done.returncode}"
        raise UserError(f"{converter} failed ({reason}); omit --gguf, or convert it by hand")
