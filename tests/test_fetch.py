"""Fetching the data against a real local server: whole, resumed, broken, wrong, missing, offline."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import leetcode_env
from faults.errors import UserError
from leetcode_env import load_problems, render_messages
from loopholes import evaluated_by
from problems import fetch as fetch_data
from problems.fetch import convert, fetch, git_blob_id

BODY = bytes(range(256)) * 2000
NAME = "leetcode_test_medhard.jsonl"


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes), with Range; hangs up after `cut` bytes as many times as `cuts` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cut, self.cuts, self.ranges, self.status = {}, [], 0, 0, True, None
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, span = self.server, self.headers.get("Range")
        server.requests.append((self.path, span))
        data = server.files.get(self.path)
        if data is None or server.status:
            return self.send_error(server.status or 404)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and server.ranges else 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:]
        if server.cuts:
            server.cuts -= 1
            rest = rest[: server.cut]
        self.wfile.write(rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def run(server, folder, body=BODY, **options):
    said = []
    fetch(folder, server.url, {NAME: git_blob_id(body)}, say=said.append, **options)
    return said


def test_git_blob_id():
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # what `git hash-object` prints


def test_a_whole_download(server, tmp_path):
    server.files = {f"/{NAME}": BODY}
    assert run(server, tmp_path / "data")[0].endswith("downloaded, verified")
    assert (tmp_path / "data" / NAME).read_bytes() == BODY
    assert run(server, tmp_path / "data")[0].endswith("already there, verified")
    assert len(server.requests) == 1


def test_a_partial_file_is_resumed(server, tmp_path):
    server.files = {f"/{NAME}": BODY}
    (tmp_path / (NAME + ".part")).write_bytes(BODY[:1000])
    run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY and server.requests == [(f"/{NAME}", "bytes=1000-")]
    assert not (tmp_path / (NAME + ".part")).exists()


def test_a_connection_that_breaks_is_taken_up_again(server, tmp_path):
    server.files, server.cut, server.cuts = {f"/{NAME}": BODY}, 70_000, 2
    run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert [span for _, span in server.requests] == [None, "bytes=70000-", "bytes=140000-"]


def test_a_connection_that_keeps_breaking_leaves_the_part(server, tmp_path):
    server.files, server.cut, server.cuts = {f"/{NAME}": BODY}, 100, 99
    with pytest.raises(UserError, match=f"can't be downloaded.*put it at {tmp_path / NAME}"):
        run(server, tmp_path)
    assert (tmp_path / (NAME + ".part")).read_bytes() == BODY[:300]
    server.cuts = 0
    run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_server_without_ranges(server, tmp_path):
    server.files, server.ranges = {f"/{NAME}": BODY}, False
    (tmp_path / (NAME + ".part")).write_bytes(b"something else")
    run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_part_that_is_too_long_is_begun_again(server, tmp_path):
    server.files = {f"/{NAME}": BODY}
    (tmp_path / (NAME + ".part")).write_bytes(BODY + b"x")
    run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_wrong_content_keeps_the_old_file(server, tmp_path):
    server.files = {f"/{NAME}": BODY[:-1] + b"?"}
    (tmp_path / NAME).write_bytes(b"old")
    with pytest.raises(UserError, match=r"not the published one.*the file that was there is kept"):
        run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"old" and not (tmp_path / (NAME + ".part")).exists()


def test_a_server_error_is_one_line(server, tmp_path):
    server.files, server.status = {f"/{NAME}": BODY}, 500
    with pytest.raises(UserError, match="HTTP 500") as error:
        run(server, tmp_path)
    assert "\n" not in str(error.value)


def test_no_network_says_which_file_to_put_where(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = leetcode_env.main(["fetch", "--data-dir", str(tmp_path), "--base-url", url])
    text = capsys.readouterr().err
    first = next(iter(fetch_data.FILES))
    assert code == 2 and text.count("\n") == 1 and f"put it at {tmp_path / first}" in text


def test_a_folder_that_can_not_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be made"):
        run(server, tmp_path / "file" / "data")


# ---- conversion ---------------------------------------------------------------------------------------------------


def source_row(**changes):
    """One line in the format of newfacade/LeetCodeDataset, made up."""
    line = {
        "task_id": "double-the-list",
        "question_id": 9001,
        "difficulty": "Medium",
        "tags": ["Array"],
        "problem_description": "Given a list nums, return every number doubled. ",
        "starter_code": "class Solution:\n    def double(self, nums: List[int]) -> List[int]:\n        ",
        "estimated_date": "2024-01-01",
        "prompt": "from typing import *\n\ninf = float('inf')\n",
        "completion": "class Solution:\n  def double(self, nums: List[int]) -> List[int]:\n    return [2 * n for n in nums]",
        "entry_point": "Solution().double",
        "test": "def check(candidate):\n    assert candidate(nums = [1, 2]) == [2, 4]\n    assert candidate(nums = []) == []\n",
        "input_output": [{"input": "nums = [1, 2]", "output": "[2, 4]"}],
        "query": "...",
        "response": "...",
    }
    return {**line, **changes}


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def test_conversion(tmp_path):
    easy, hard = source_row(difficulty="Easy"), source_row(difficulty="Hard", question_id=2)
    (tmp_path / "in").write_bytes(lines(source_row(), easy, hard))
    assert convert(tmp_path / "in", tmp_path / "out") == 2
    problem, other = load_problems(tmp_path / "out")
    assert (problem.id, problem.difficulty, other.id, other.difficulty) == (9001, "medium", 2, "hard")
    assert problem.gt_answer[0] == "assert Solution().double(nums=[1, 2]) == [2, 4]" and problem.method == "double"
    text = render_messages(problem, evaluated_by())[-1]["content"]
    assert text.startswith("PROBLEM:\nGiven a list") and text.endswith("\n\nSOLUTION:\n")
    assert "called double and will be evaluated by calling a function called run_tests(). Use the following" in text
    assert "List[int]:\n        # Add your code here\n```" in text
    with leetcode_env.LeetCodeEnv(workers=1) as env:
        (grade,) = env.grade([(problem, f"```python\n{problem.canonical_solution}\n```", evaluated_by())])
    assert grade.label == "correct"


@pytest.mark.parametrize(
    "change", [{"test": "def check(candidate: pass"}, {"test": "x = 1"}, {"difficulty": 1}, {"entry_point": None}]
)
def test_a_source_line_that_is_damaged_is_named(tmp_path, change):
    (tmp_path / "in").write_bytes(lines(source_row(), source_row(**change)))
    with pytest.raises(UserError, match="line 2: no problem of LeetCodeDataset"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_gone_is_converted_from_its_source(server, tmp_path):
    server.files = {"/source/LeetCodeDataset-test.jsonl": lines(source_row())}
    (said,) = run(server, tmp_path, source_url=f"{server.url}/source")
    assert "1 problems converted from the source data set instead" in said
    assert load_problems(tmp_path / NAME)[0].id == 9001


def test_gone_with_its_source_too(server, tmp_path):
    with pytest.raises(UserError, match=f"put the first at {tmp_path / NAME}"):
        run(server, tmp_path, source_url=f"{server.url}/source")


def test_a_file_that_is_gone_never_replaces_one_that_is_there(server, tmp_path):
    server.files = {"/source/LeetCodeDataset-test.jsonl": lines(source_row())}
    (tmp_path / NAME).write_bytes(b"old")
    with pytest.raises(UserError, match="the file that is there is kept"):
        run(server, tmp_path, source_url=f"{server.url}/source")
    assert (tmp_path / NAME).read_bytes() == b"old"


def test_the_command_line_checks_what_it_fetched(server, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").write_bytes(lines(source_row()))
    convert(tmp_path / "in", tmp_path / "out")
    good = (tmp_path / "out").read_bytes()
    server.files = {f"/{NAME}": good}
    monkeypatch.setattr(fetch_data, "FILES", {NAME: git_blob_id(good)})
    assert leetcode_env.main(["fetch", "--data-dir", str(tmp_path / "d"), "--base-url", server.url]) == 0
    assert "1 problems, every line sound" in capsys.readouterr().out
    assert (tmp_path / "d" / f"{NAME}.manifest").exists()
    assert leetcode_env.main(["check", str(tmp_path / "d" / NAME)]) == 0
    assert "1 of 1 canonical solutions judged correct" in capsys.readouterr().out


def test_a_damaged_file_gets_no_manifest(server, tmp_path, capsys, monkeypatch):
    server.files = {f"/{NAME}": b"{}\n"}
    monkeypatch.setattr(fetch_data, "FILES", {NAME: git_blob_id(b"{}\n")})
    assert leetcode_env.main(["fetch", "--data-dir", str(tmp_path), "--base-url", server.url]) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / f"{NAME}.manifest").exists()


# ---- mistakes -----------------------------------------------------------------------------------------------------

MISTAKES = ["foo", "", "/", "foo/bar", "ftp://example.org", "http://", "https:///x", "http://[bad", "http://host:port/x",
            "http://a b/c", "http://é\ud800/x", "http://host/\n", "http://host:99999", "data:text/plain,x", "-1",
            "http://user:pass@/x"]  # fmt: skip


@pytest.mark.parametrize("url", MISTAKES)
def test_a_base_url_that_is_none_is_one_line(tmp_path, capsys, url):
    assert leetcode_env.main(["fetch", "--data-dir", str(tmp_path / "data"), f"--base-url={url}"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["d", f"d/{NAME}", f"d/{NAME}.part"])
def test_something_else_where_a_file_should_go_is_one_line(server, tmp_path, capsys, monkeypatch, place):
    monkeypatch.setattr(fetch_data, "FILES", {NAME: git_blob_id(BODY)})
    server.files = {f"/{NAME}": BODY}
    if place == "d":
        (tmp_path / "d").write_text("")
    else:
        (tmp_path / place / "inside").mkdir(parents=True)
    assert leetcode_env.main(["fetch", "--data-dir", str(tmp_path / "d"), "--base-url", server.url]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and str(tmp_path / "d") in text


def test_a_conversion_that_can_not_be_written_is_one_line(server, tmp_path):
    server.files = {"/source/LeetCodeDataset-test.jsonl": lines(source_row())}
    (tmp_path / f".{NAME}.tmp").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path / NAME}: can't be read or written: Is a directory$"):
        run(server, tmp_path, source_url=f"{server.url}/source")


def test_a_source_that_is_no_text_is_one_line(server, tmp_path):
    server.files = {"/source/LeetCodeDataset-test.jsonl": lines(source_row()) + b"\xff\xfe"}
    with pytest.raises(UserError, match="line 2: no problem of LeetCodeDataset"):
        run(server, tmp_path, source_url=f"{server.url}/source")


@pytest.mark.parametrize(
    "arguments", [["check", "none"], ["check", ""], ["check", "."], ["check", "/dev/null"], ["check", "x" * 5000]]
)
def test_a_file_to_check_that_is_none_is_one_line(arguments, capsys):
    assert leetcode_env.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["fetch", "x"], ["check"], ["fetch", "--x"], ["check", "a", "b"]])
def test_arguments_that_do_not_parse_are_one_line(arguments, capsys):
    assert leetcode_env.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
