"""What `make audit` makes of pip-audit's words: an audit that was not done never passes for one that found nothing."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from audit import FOUND, NOT_DONE, ROOT, audit, verdict

CLEAN = {"name": "jinja2", "version": "3.1.6", "vulns": []}
WEAK = {
    "name": "torch",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": [], "description": "x"}],
}
SKIPPED = {"name": "jinja2", "skip_reason": "Dependency not found on PyPI and could not be audited: jinja2 (3.1.6)"}
NO_NETWORK = (
    "WARNING:pip_audit._cli:--no-deps is supported\nTraceback (most recent call last):\n  File x\n"
    "requests.exceptions.ConnectionError: Max retries exceeded (Name or service not known)\n"
)


def said(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_nothing_found():
    assert verdict(said(CLEAN), "") == (0, "1 packages audited, 0 known weaknesses in 0 of them.")


def test_what_is_found_is_named_with_the_version_that_mends_it():
    found = verdict(said(CLEAN, WEAK), "Found 1 known vulnerability")
    assert found.code == FOUND
    assert found.text.startswith("torch 2.0: PYSEC-1, mended in 2.1\n")


@pytest.mark.parametrize(
    ("stdout", "stderr", "why"),
    [
        ("", NO_NETWORK, "Name or service not known"),
        ("", "", "pip-audit says nothing"),
        ("", "No module named pip_audit", "No module named pip_audit"),
        (said(), "", "0 of 0 packages"),
        # Seen behind an index that hands out packages and knows nothing of weaknesses: pip-audit itself ends with 0.
        (said(CLEAN, SKIPPED), "No known vulnerabilities found", "1 of 2 packages could not be asked for. jinja2"),
        ("[]", "", "pip-audit says nothing"),
    ],
)
def test_what_was_not_audited_says_so(stdout: str, stderr: str, why: str):
    found = verdict(stdout, stderr)
    assert found.code == NOT_DONE
    assert found.text.startswith("NOT AUDITED")
    assert why in found.text


def test_all_that_is_audited_is_a_version_and_no_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if line.count("==") != 1] == []


@pytest.fixture
def advisories() -> Iterator[str]:
    """A service that speaks OSV's protocol and knows of a weakness in one package."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.1"}]}]
            package = {"name": "torch", "ecosystem": "PyPI"}
            known = {"id": "PYSEC-1", "details": "x", "affected": [{"package": package, "ranges": ranges}]}
            content = json.dumps({"vulns": [known]} if asked == "torch" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(importlib.util.find_spec("pip_audit") is None, reason="pip-audit is not installed")
def test_pip_audit_itself(advisories: str, tmp_path: Path):
    (tmp_path / "pinned.txt").write_text("jinja2==3.1.6\ntorch==2.0\n")
    options = ("--vulnerability-service", "osv", "--osv-url", advisories)
    found = audit(tmp_path / "pinned.txt", *options)
    assert (found.code, "torch 2.0: PYSEC-1, mended in 2.1" in found.text) == (FOUND, True), found.text
    (tmp_path / "pinned.txt").write_text("jinja2==3.1.6\n")
    assert audit(tmp_path / "pinned.txt", *options).code == 0
    assert audit(tmp_path / "pinned.txt", *options[:3], "http://127.0.0.1:9/").code == NOT_DONE
