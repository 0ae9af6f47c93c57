"""Builds ``newllm._C`` with ninja: C++ with any working compiler, CUDA where nvcc works; no torch.

Run by setup.py. CXX and NVCC name the compilers, NEWLLM_CUDA is auto, 0 or 1, and NEWLLM_CUDA_ARCHS replaces
the list of architectures ("80;90a").
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra"
# The sources *_sweep_cpu.cpp are compiled once for each; cpu_dispatch.cpp knows the names.
INSTRUCTIONS = {"plain": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTIONS |= {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mfma"}
ARCHITECTURES = ("80", "90a", "100")
PROBE = "int main() {}\n"
CUDA_PROBE = "__global__ void nothing() {}\nint main() { nothing<<<1, 1>>>(); }\n"


class Cuda(NamedTuple):
    """An nvcc that works (None: there is none) with its flags, and what ``build_info()`` says of it."""

    nvcc: str | None
    flags: str
    said: str


def build(sources: Path, scratch: Path, target: Path) -> None:
    """Build the module from the folder ``sources`` to the file ``target``, with ``scratch`` for objects.

    Without a working C++ compiler nothing is built, and what an earlier build left is removed. Raises
    RuntimeError, with the compilers' own words, where our sources do not compile, or NEWLLM_CUDA=1 and nvcc
    does not work.
    """
    scratch, target = scratch.resolve() / "csrc", target.resolve()
    for stale in (target, *(sources.parent / "newllm").glob("_C.*")):
        stale.unlink(missing_ok=True)
    compiler = find_compiler()
    if compiler is None:
        print("newllm: no C++ compiler works; installing without newllm._C", file=sys.stderr)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    cuda = find_cuda(compiler, [*sources.glob("*.cu")])
    (scratch / "build.ninja").write_text(rules(sources.resolve(), target, compiler, cuda), encoding="utf-8")
    done = subprocess.run(
        [find_ninja(), "-C", str(scratch)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"newllm._C does not compile:\n{done.stdout}")


def find_compiler() -> str | None:
    """The first C++ compiler that compiles and links an empty program."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        if compiles(shlex.split(command), PROBE, ".cpp", "-std=c++17") is None:
            return command
    return None


def find_cuda(compiler: str, kernels: list[Path]) -> Cuda:
    """What nvcc can do here, as NEWLLM_CUDA allows."""
    wanted = os.environ.get("NEWLLM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"NEWLLM_CUDA must be auto, 0 or 1, got {wanted!r}")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if wanted == "0":
        return Cuda(None, "", "absent: NEWLLM_CUDA=0")
    if not kernels:
        return Cuda(None, "", "absent: no CUDA sources")
    problem = "nvcc was not found"
    if nvcc is not None:
        problem = compiles([nvcc, "-ccbin", shlex.split(compiler)[0]], CUDA_PROBE, ".cu")
        if problem is None:
            architectures, flags = find_architectures(nvcc)
            return Cuda(nvcc, flags, f"{architectures}, by nvcc {version(nvcc)}")
    if wanted == "1":
        raise RuntimeError(f"NEWLLM_CUDA=1, but {problem}")
    return Cuda(None, "", f"absent: {problem}")


def find_architectures(nvcc: str) -> tuple[str, str]:
    """Names and nvcc's flags of those architectures that it knows, with PTX of the last for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {line.removeprefix("compute_") for line in listed.split()}
    named = os.environ.get("NEWLLM_CUDA_ARCHS")
    chosen = named.split(";") if named else [name for name in ARCHITECTURES if name.rstrip("a") in known]
    last = chosen[-1].rstrip("af")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    flags.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    return " ".join([*(f"sm_{name}" for name in chosen), f"compute_{last}"]), " ".join(flags)


def compiles(command: list[str], program: str, suffix: str, *flags: str) -> str | None:
    """None where ``command`` makes ``program`` an executable, else one line that says why not."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"probe{suffix}"
        source.write_text(program, encoding="utf-8")
        try:
            done = subprocess.run(
                [*command, *flags, str(source), "-o", str(Path(folder) / "probe")],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            return str(error)
    said = " ".join((done.stderr or done.stdout).split()) or "it said nothing"
    return f"{command[0]} fails: {said[:300]}" if done.returncode else None


def version(command: str) -> str:
    """The line with which a compiler says its version."""
    done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]
    return (release or lines or [""])[0].strip()


def find_ninja() -> str:
    """The ninja of the Python package, or one on the path."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("ninja is needed to build newllm._C: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def rules(sources: Path, target: Path, compiler: str, cuda: Cuda) -> str:
    """The text of build.ninja."""
    import pybind11

    includes = [
        f"-isystem {quoted(folder)}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))
    ]
    defined = {"NEWLLM_COMPILER": version(compiler), "NEWLLM_CUDA": cuda.said}
    words = [f"-D{name}={quoted(json_string(value))}" for name, value in defined.items()]
    shared = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -s"
    link = f"{compiler} {shared} -pthread $in -o $out"
    if cuda.nvcc is not None:
        words.append("-DNEWLLM_WITH_CUDA")
        host = f"-ccbin {quoted(shlex.split(compiler)[0])}"
        link = f"{quoted(cuda.nvcc)} {host} -shared -cudart static $in -o $out -Xlinker --exclude-libs,ALL,-s"
    lines = [
        rule("cxx", f"{compiler} {FLAGS} -pthread $flags -MMD -MF $out.d -c $in -o $out", True),
        rule("link", link, False),
    ]
    objects = []
    for source in sorted(sources.glob("*.cpp")):
        variants = INSTRUCTIONS if source.stem.endswith("_sweep_cpu") else {"": ""}
        for name, flags in variants.items():
            extra = f"-DNEWLLM_ISA={name} {flags}" if name else ""
            if source.stem == "bindings":
                extra = " ".join(["-O1", *includes, *words])
            objects.append(f"{source.stem}{name and '.'}{name}.o")
            lines.append(f"build {objects[-1]}: cxx {escaped(source)}\n  flags = {extra}\n")
    if cuda.nvcc is not None:
        flags = f"-O3 -std=c++17 -t 0 -Xcompiler -fPIC,-fvisibility=hidden {cuda.flags}"
        command = f"{quoted(cuda.nvcc)} {host} {flags} -MMD -MF $out.d -c $in -o $out"
        lines.append(rule("nvcc", command, True))
        # The longest of them first: begun last it would be built alone.
        for source in sorted(sources.glob("*.cu"), key=lambda source: ("grid" not in source.stem, source)):
            objects.append(f"{source.stem}.cu.o")
            lines.append(f"build {objects[-1]}: nvcc {escaped(source)}\n")
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}\n")
    return "\n".join(lines)


def rule(name: str, command: str, compiles: bool) -> str:
    """A ninja rule; compiling ones say which headers they read."""
    return f"rule {name}\n  command = {command}\n" + (
        "  depfile = $out.d\n  deps = gcc\n" if compiles else ""
    )


def quoted(text: str) -> str:
    """``text`` as one word of a shell command in ninja's syntax."""
    return shlex.quote(text).replace("$", "$$")


def json_string(text: str) -> str:
    """``text`` as a C++ string."""
    plain = text.replace("\\", "/").replace('"', "'")
    return f'"{plain}"'


def escaped(path: Path) -> str:
    """``path`` in ninja's syntax."""
    return "".join(f"${letter}" if letter in "$ :" else letter for letter in str(path))
