"""Dockerfiles, read line by line: there is no Docker where the tests run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from manifests.finding import SECRET, Finding, check_image

INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "SHELL",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


@dataclass(frozen=True)
class Instruction:
    line: int
    name: str
    rest: str


@dataclass
class Stage:
    """A part from one FROM to the next."""

    name: str
    image: str
    line: int
    instructions: list[Instruction] = field(default_factory=list)


def instructions(text: str) -> Iterator[Instruction]:
    """With continued lines joined and comments gone."""
    parts: list[str] = []
    start = 0
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        start = start if parts else number
        parts.append(raw.rstrip().removesuffix("\\").strip())
        if not raw.rstrip().endswith("\\"):
            name, _, rest = " ".join(parts).partition(" ")
            yield Instruction(start, name.upper(), rest.strip())
            parts = []


def stages(text: str) -> tuple[list[Stage], dict[str, str]]:
    """The stages, and the defaults of the arguments before the first."""
    found: list[Stage] = []
    arguments: dict[str, str] = {}
    for step in instructions(text):
        if step.name == "FROM":
            image, _, name = step.rest.partition(" AS ")
            found.append(Stage(name or str(len(found)), _filled(image, arguments), step.line))
        elif found:
            found[-1].instructions.append(step)
        elif step.name == "ARG":
            name, _, value = step.rest.partition("=")
            arguments[name] = value
    return found, arguments


def _filled(text: str, arguments: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: arguments.get(match[1], match[0]), text)


def check_dockerfile(text: str) -> Iterator[Finding]:
    """Versions, user, secrets, and what goes into the image."""
    found, _ = stages(text)
    if not found:
        yield Finding("missing-field", "1", "no FROM")
    names = {stage.name: stage for stage in found}
    for stage in found:
        if stage.image not in names:
            yield from check_image(str(stage.line), stage.image)
        for step in stage.instructions:
            yield from _check_step(step)
    for stage in _targets(found):
        yield from _check_target(stage, names)


def _targets(found: list[Stage]) -> Iterator[Stage]:
    """Stages that nothing is built on or copied from: what somebody runs."""
    used = {stage.image for stage in found}
    for stage in found:
        used |= {match[1] for step in stage.instructions for match in re.finditer(r"--from=(\S+)", step.rest)}
    yield from (stage for stage in found if stage.name not in used)


def _check_target(stage: Stage, names: Mapping[str, Stage]) -> Iterator[Finding]:
    chain = [stage]
    while chain[-1].image in names:
        chain.append(names[chain[-1].image])
    steps = [step for part in reversed(chain) for step in part.instructions]
    users = [step.rest for step in steps if step.name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found = users[-1] if users else "none"
        yield Finding("root", stage.name, f"USER {found}: give a number other than 0, which runAsNonRoot can tell")
    if not any(step.name == "HEALTHCHECK" for step in steps):
        yield Finding("no-probe", stage.name, "HEALTHCHECK: how to tell that it is well, or NONE, with why")


def _check_step(step: Instruction) -> Iterator[Finding]:
    where, rest = str(step.line), step.rest
    if step.name not in INSTRUCTIONS:
        yield Finding("unknown-field", where, f"{step.name} is no instruction")
    if step.name == "ADD" or (step.name == "COPY" and rest.split()[-2:-1] == ["."]):
        yield Finding("too-much", where, f"{step.name} {rest}: COPY what is needed, by name")
    if step.name in ("ENV", "ARG"):
        for name in re.findall(r"(?:^|\s)(\w+)(?==|$)", rest):
            if SECRET.search(name):
                yield Finding("plain-secret", where, f"{name} would stay in the image's history")
    if step.name == "RUN":
        yield from _check_run(where, rest)


def _check_run(where: str, command: str) -> Iterator[Finding]:
    if re.search(r"(curl|wget)\b.*\|\s*(ba)?sh", command):
        yield Finding("unpinned", where, "runs what the network gives it today")
    for part in re.split(r"&&|;", command):
        if re.search(r"\bpip install\b", part) and not re.search(r"--constraint\b|-c\b", part):
            yield Finding("unpinned", where, f"{part.strip()}: without --constraint the image is another one tomorrow")
        if re.search(r"\bpip (install|wheel)\b", part) and "--no-cache-dir" not in part:
            yield Finding("too-much", where, f"{part.strip()}: --no-cache-dir, or the image holds everything twice")
    if "apt-get install" in command and not (
        "--no-install-recommends" in command and "rm -rf /var/lib/apt/lists/*" in command
    ):
        yield Finding("too-much", where, "apt-get: --no-install-recommends, and remove the lists in the same layer")
    if re.search(r"\bsudo\b|chmod (-R )?777", command):
        yield Finding("privilege", where, "sudo, or files that everybody may write")


def copied(text: str) -> set[str]:
    """What is copied from the build's own folder."""
    found, _ = stages(text)
    steps = [step for stage in found for step in stage.instructions]
    copies = [step.rest.split() for step in steps if step.name == "COPY" and "--from=" not in step.rest]
    return {str(PurePosixPath(source)) for words in copies for source in words[:-1]}
