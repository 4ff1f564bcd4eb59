"""Reward servers: real ones on the loopback, and what goes wrong with them."""

import importlib.util
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_rewards import ALONE, PROMPTS, config, metrics, samples, trainer_on

from fourscore.errors import FourscoreError, RewardError
from fourscore.rewards.function import Function
from fourscore.rewards.scorer import Scorer
from fourscore.rewards.server import Server, check_server
from fourscore.rewards.shaping import Shaping

EXAMPLE = Path(__file__).parents[1] / "examples" / "reward_server" / "server.py"


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers what `answer` gives of a request (an int is a status); its address, and the requests."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            given = answer(body)
            content = (
                b"no" if isinstance(given, int) else given if isinstance(given, bytes) else json.dumps(given).encode()
            )
            try:
                self.send_response(given if isinstance(given, int) else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the other side has stopped waiting
                pass

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/get_reward", requests
    finally:
        server.shutdown()
        server.server_close()


def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def ask(url: str, *others: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"timeout": 5.0, "retries": 2, "concurrency": 4, "batch_size": 2}
    rewards = [*(Function(f) for f in others), Server(url, **(settings | options))]
    return Scorer(rewards, None, Shaping(), ALONE).rate(samples(label=["x", "y", "z"], more=[1, 2, 3]))


def lengths(body: dict[str, Any]) -> dict[str, Any]:
    return {"rewards": [len(ids) for ids in body["completion_ids"]]}


def test_what_is_sent_and_what_comes_back() -> None:
    with serving(lengths) as (url, requests):
        rated = ask(url)
    assert rated.scores.tolist() == [2, 1, 3]
    first, second = sorted(requests, key=lambda body: -len(body["query"]))
    assert (len(first["query"]), len(second["query"])) == (2, 1)
    assert first["prompts"] == ["the film", "a plot"]
    assert first["query"][0].startswith("the film") and first["query"][0].endswith("<|endoftext|>")
    assert second["labels"] == ["z"] and first["columns"] == {"label": ["x", "y"], "more": [1, 2]}
    assert first["completion_ids"] == [[40, 0], [41]] and len(first["completions"]) == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda body: {"rewards": [0.5] * len(body["query"]), "scores": [1] * len(body["query"]), "extra_logs": {}},
        lambda body: {"reward": [0.5] * len(body["query"])},
        lambda body: {"scores": [0.5] * len(body["query"])},
        lambda body: [0.5] * len(body["query"]),
        lambda body: {"rewards": [0.5] * len(body["query"])} if len(body["query"]) > 1 else {"rewards": 0.5},
    ],
)
def test_the_answers_of_openrlhf_and_its_kin(answer: Any) -> None:
    with serving(answer) as (url, _):
        assert ask(url).scores.tolist() == [0.5] * 3


def test_token_rewards_none_and_extra_logs() -> None:
    def answer(body):
        rewards = [[1.0] * len(ids) if len(ids) > 1 else None for ids in body["completion_ids"]]
        return {"rewards": rewards, "extra_logs": {"hits": [1, 2, 3], "load": 0.5, "host": "a", "none": [], "lr": 1}}

    with serving(answer) as (url, _):
        rated = ask(url, batch_size=3)
    assert rated.token_rewards.tolist() == [1, 1, 0, 1, 1, 1]
    assert rated.metrics["hits"] == 2 and rated.metrics["load"] == 0.5
    assert not {"host", "none", "lr"} & rated.metrics.keys()
    assert rated.metrics[f"rewards/{url.split('/')[2]}/share"] == pytest.approx(2 / 3)


def test_failing_twice_and_then_fine() -> None:
    tries: list[int] = []

    def answer(body):
        tries.append(1)
        return 503 if len(tries) <= 2 else lengths(body)

    with serving(answer) as (url, _):
        started = time.perf_counter()
        assert ask(url, batch_size=3).scores.tolist() == [2, 1, 3]
        assert time.perf_counter() - started > 0.9  # it waits before it asks again
    with serving(lambda body: 503) as (url, requests):
        with pytest.raises(
            RewardError, match=r"127.0.0.1:\d+/get_reward: it answered with status 503 in 2 tries \(no\)"
        ):
            ask(url, batch_size=3, retries=1)
        assert len(requests) == 2


def test_requests_run_at_the_same_time_and_beside_functions() -> None:
    def slow(body):
        time.sleep(0.4)
        return lengths(body)

    def function(completions):
        time.sleep(0.4)
        return [0.0] * len(completions)

    with serving(slow) as (url, requests):
        started = time.perf_counter()
        ask(url, function, batch_size=1)
        assert time.perf_counter() - started < 1.0
        assert len(requests) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: {"rewards": [1.0]}, "it gave 1 rewards for 3 samples"),
        (lambda body: {"result": 1}, 'its answer has no list "rewards" ({"result": 1})'),
        (lambda body: b"<html>", "its answer is not JSON (b'<html>')"),
        (lambda body: 404, "it answered with status 404 (no)"),
        (lambda body: {"rewards": [1.0, math.nan, 1.0]}, "gave nan, which is not finite, for the sample 'a plot"),
        (lambda body: {"rewards": [1.0, "x", 1.0]}, "gave 'x', which is no number, for the sample 'a plot"),
    ],
)
def test_answers_that_are_no_rewards(answer: Any, message: str) -> None:
    with serving(answer) as (url, requests), pytest.raises(RewardError) as error:
        ask(url, batch_size=3)
    assert str(error.value).startswith("reward '127.0.0.1:") and message in str(error.value)
    assert len(requests) == 1


def test_a_server_that_is_too_slow_or_dead() -> None:
    with (
        serving(lambda body: time.sleep(3) or lengths(body)) as (url, _),
        pytest.raises(RewardError, match=r"no answer in 2 tries \(.*[Rr]ead timed out"),
    ):
        ask(url, timeout=0.2, retries=1, batch_size=3)
    dead = f"http://127.0.0.1:{unused_port()}/"
    with pytest.raises(RewardError, match=r"no answer in 1 tries \(.*refused"):
        ask(dead, retries=0)
    with pytest.raises(FourscoreError, match=f"--reward_url {dead}: nobody answers there .*start the server first"):
        check_server(dead, 60)
    with pytest.raises(FourscoreError, match="nobody answers there"):
        check_server("http://a..b:80", 60)
    with serving(lengths) as (url, requests):
        check_server(url, 60)
        assert not requests


def test_a_run_on_the_example_server(tmp_path: Path) -> None:
    port = unused_port()
    process = subprocess.Popen([sys.executable, str(EXAMPLE), str(port)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                check_server(url, 5)
                break
            except FourscoreError:
                time.sleep(0.1)
        args = config(tmp_path, max_steps=2, reward_url=[url, f"{url}/again"], reward_weights=[1.0, 0.5])
        trainer = trainer_on(args)
        seen: list[Any] = []
        rated = trainer._rated
        trainer._rated = lambda e, *rest: (seen.append((trainer._texts(e), rated(e, *rest))), seen[-1][1])[1]
        trainer.train()
    finally:
        process.kill()
        process.wait()
    spec = importlib.util.spec_from_file_location("example_server", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for texts, each in seen:
        assert all(prompt in PROMPTS for prompt, _ in texts)
        expected = [1.5 * example.reward("", completion, None) for _, completion in texts]
        assert each.scores.tolist() == pytest.approx(expected)
    rows = metrics(tmp_path)
    name = f"127.0.0.1:{port}"
    assert rows[0][f"rewards/{name}/mean"] == rows[0][f"rewards/{name}_2/mean"]


def test_the_docs_show_the_example() -> None:
    docs = (EXAMPLE.parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert EXAMPLE.read_text(encoding="utf-8") in docs


def test_a_server_that_dies_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    def answer(body):
        return lengths(body) if len(requests) <= 2 else 500

    with serving(answer) as (url, requests):
        args = config(tmp_path, reward_url=[url], reward_retries=0)
        with pytest.raises(RewardError, match=r"status 500.*2 updates before are in .*checkpoint-2"):
            trainer_on(args).train()
    with serving(lengths) as (url, _):
        trainer_on(config(tmp_path, reward_url=[url])).train(resume_from_checkpoint=True)
    assert len(metrics(tmp_path)) == 4
