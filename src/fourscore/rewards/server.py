"""A reward server over HTTP; `docs/rewards.md` has the protocol, with the names of OpenRLHF's remote reward model.

Each process asks for its own samples, in batches, several at a time; urllib3 keeps connections and repeats what fails.
"""

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3
from urllib3.util import Retry, Timeout, parse_url

from fourscore.errors import FourscoreError, RewardError
from fourscore.rewards.samples import Notes, Samples, is_the_runs, label

_CONNECT_S = 5.0
_BACKOFF_S = 0.5
_WORTH_REPEATING = (408, 425, 429, 500, 502, 503, 504)
_LABELS = ("label", "labels")


class Server:
    """A server as a source of rewards."""

    kind = "reward"
    is_async = may_abstain = True

    def __init__(self, url: str, *, timeout: float, retries: int, concurrency: int, batch_size: int) -> None:
        """Describe a server; nothing is sent yet.

        Args:
            url: that batches are posted to.
            timeout: seconds that an answer may take.
            retries: times that a request is repeated, after pauses of 0, 1, 2, 4, ... seconds.
            concurrency: requests at a time.
            batch_size: samples in a request.
        """
        self.name = parse_url(url).netloc or url
        self._url = url
        self._batch_size = batch_size
        self._tries = retries + 1
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="reward-server")
        self._http = urllib3.PoolManager(
            maxsize=concurrency,
            timeout=Timeout(connect=min(_CONNECT_S, timeout), read=timeout),
            retries=Retry(
                total=retries,
                backoff_factor=_BACKOFF_S,
                status_forcelist=_WORTH_REPEATING,
                allowed_methods=None,
                raise_on_status=False,
            ),
        )

    async def rate(self, samples: Samples, notes: Notes) -> Any:
        """Ask for the rewards of all samples."""
        rows = _rows(samples)
        size, loop = self._batch_size, asyncio.get_running_loop()
        batches = [{key: values[i : i + size] for key, values in rows.items()} for i in range(0, len(samples), size)]
        answers = await asyncio.gather(*(loop.run_in_executor(self._threads, self._ask, each) for each in batches))
        rewards: list[Any] = []
        for answer, extra in answers:
            rewards += answer
            for name, values in extra.items():
                notes.log_metric(name, sum(values) / len(values))
        return rewards

    def _ask(self, batch: dict[str, list[Any]]) -> tuple[list[Any], dict[str, list[float]]]:
        columns = {key.removeprefix(_COLUMN): values for key, values in batch.items() if key.startswith(_COLUMN)}
        body = {key: values for key, values in batch.items() if not key.startswith(_COLUMN)} | {"columns": columns}
        content = json.dumps(body, default=str).encode()
        try:
            response = self._http.request("POST", self._url, body=content, headers={"Content-Type": "application/json"})
        except urllib3.exceptions.HTTPError as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise self._error(f"no answer in {self._tries} tries ({reason})") from error
        if response.status != 200:
            text = " ".join(response.data.decode("utf-8", "replace").split())[:200]
            tries = f" in {self._tries} tries" if response.status in _WORTH_REPEATING else ""
            raise self._error(f"it answered with status {response.status}{tries} ({text})")
        try:
            answer = json.loads(response.data)
        except ValueError as error:
            raise self._error(f"its answer is not JSON ({response.data[:100]!r})") from error
        rewards, extra = _taken_apart(answer)
        if rewards is None:
            raise self._error(f'its answer has no list "rewards" ({json.dumps(answer)[:200]})')
        n = len(batch["query"])
        if not isinstance(rewards, list):  # of a single sample, some servers give the number itself
            rewards = [rewards]
        if len(rewards) != n:
            raise self._error(f"it gave {len(rewards)} rewards for {n} samples")
        return rewards, extra

    def _error(self, what: str) -> RewardError:
        return RewardError(f"{label(self)}: {self._url}: {what}")


_COLUMN = "columns/"


def _rows(samples: Samples) -> dict[str, list[Any]]:
    """What is sent of each sample, by key; those of the dataset's other columns have a prefix."""
    queries, prompts = samples.with_special_tokens
    nothing = [None] * len(samples)
    rows: dict[str, list[Any]] = {
        "query": queries,
        "prompts": prompts,
        "labels": next((samples.columns[name] for name in _LABELS if name in samples.columns), nothing),
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
    }
    if samples.conversational:
        rows["messages"] = samples.prompts
    return rows | {f"{_COLUMN}{name}": values for name, values in samples.columns.items()}


def _taken_apart(answer: Any) -> tuple[Any, dict[str, list[float]]]:
    """The rewards of an answer, None without any, and the numbers it has for the log."""
    if isinstance(answer, list):
        return answer, {}
    if not isinstance(answer, dict):
        return None, {}
    extra = answer.get("extra_logs")
    logs = extra.items() if isinstance(extra, dict) else ()
    lists = {str(name): values if isinstance(values, list) else [values] for name, values in logs}
    numbers = {
        name: values
        for name, values in lists.items()
        if values and all(isinstance(value, int | float) for value in values) and not is_the_runs(name)
    }
    return next((answer[key] for key in ("rewards", "reward", "scores") if key in answer), None), numbers


def check_server(url: str, timeout: float) -> None:
    """Connect once, to see that somebody listens; nothing is asked.

    Args:
        url: of a server.
        timeout: seconds, of which no more than a few are used.

    Raises:
        FourscoreError: nobody listens.
    """
    try:
        place = parse_url(url)
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection(((place.host or "").strip("[]"), port), min(_CONNECT_S, timeout)).close()
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FourscoreError(f"--reward_url {url}: nobody answers there ({reason}); start the server first") from error
