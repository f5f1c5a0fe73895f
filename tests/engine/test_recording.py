"""Laws of recordings: what was told is kept in order, and comes back from a file unchanged."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler_fuzz import RandomRun, draw_config, draw_policies
from scheduler_model import Driver
from twostroke.core.policy import Policies
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import Finished, SchedulerConfig, StepOutcome
from twostroke.engine.recording import (
    Cancel,
    Commit,
    Header,
    Input,
    Lose,
    Plan,
    Recording,
    RecordingScheduler,
    Submit,
)
from twostroke.engine.recording_file import encode, read_recording, write_recording
from twostroke.errors import ExecutorLost, InvalidParameter
from twostroke.policies.draft import PromptLookup
from twostroke.sim.recorded import replay_recording

SEEDS = range(60)


def make_policies(seed: int) -> Policies:
    """What the random run of this seed has, but a drafter that needs only tokens, made anew."""
    rng = random.Random(seed)
    policies = draw_policies(rng, draw_config(rng))
    return replace(policies, drafter=PromptLookup(None) if policies.drafter else None)


def record_random(seed: int) -> tuple[Recording, Policies]:
    """A random run's recording, and fresh policies to replay it with."""
    run = RandomRun(seed)
    driver = run.driver = Driver(run.driver.config, make_policies(seed))
    recorder = RecordingScheduler(driver.scheduler)
    driver.scheduler = recorder.as_scheduler()
    for _ in range(120):
        run.step()
    driver.drain()
    recording = Recording(Header("fake", driver.config), tuple(recorder.inputs))
    return recording, make_policies(seed)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording on disk that has every kind of input."""
    path = tmp_path_factory.mktemp("recording") / "run.jsonl"
    found: list[Input] = []
    config = None
    for seed in SEEDS:
        recording, _ = record_random(seed)
        found += recording.inputs
        config = recording.header.config
        if len({type(one) for one in found}) == 7:
            break
    assert config is not None
    write_recording(Recording(Header("fake", config), tuple(found)), path)
    return path


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_run_replayed_from_its_file_gives_the_same_plans(
    seed: int, tmp_path: Path
) -> None:
    recording, policies = record_random(seed)
    path = tmp_path / "run.jsonl"
    write_recording(recording, path)
    again = read_recording(path)
    assert again == recording
    replayed = replay_recording(again, policies)
    assert replayed.difference is None
    plans = [one for one in recording.inputs if isinstance(one, Plan) and one.plan is not None]
    assert replayed.plans == len(plans)


def test_a_replay_shows_the_first_plan_that_differs() -> None:
    recording, policies = record_random(3)
    at = next(i for i, one in enumerate(recording.inputs) if isinstance(one, Submit))
    first = recording.inputs[at]
    assert isinstance(first, Submit)
    other = replace(first, request=replace(first.request, prompt=(1, *first.request.prompt)))
    inputs = (*recording.inputs[:at], other, *recording.inputs[at + 1 :])
    found = replay_recording(replace(recording, inputs=inputs), policies).difference
    assert found is not None
    assert found.recorded != found.replayed
    assert found.number > at


def test_equal_messages_give_equal_bytes_and_others_others(written: Path) -> None:
    inputs = read_recording(written).inputs
    encoded = [encode(one) for one in inputs]
    again = [encode(one) for one in read_recording(written).inputs]
    assert encoded == again
    for one, text in zip(inputs[:200], encoded[:200], strict=True):
        for other, its in zip(inputs[:200], encoded[:200], strict=True):
            assert type(one) is not type(other) or (one == other) == (text == its)


def test_what_raised_is_not_kept() -> None:
    config = SchedulerConfig(4, 2, 8, 4, 8, 17)
    recorder = RecordingScheduler(Scheduler(config))
    with pytest.raises(ExecutorLost):
        recorder.commit(StepOutcome(7, (), 1), 0)
    with pytest.raises(InvalidParameter):
        recorder.attach("nobody", (), 1)
    assert recorder.inputs == []


def test_a_recorder_answers_all_else_like_the_scheduler_inside() -> None:
    scheduler = Scheduler(SchedulerConfig(4, 2, 8, 4, 8, 17))
    recorder = RecordingScheduler(scheduler).as_scheduler()
    assert recorder.num_free_blocks == 4
    assert recorder.memory is scheduler.memory
    assert recorder.config is scheduler.config


def test_an_ending_survives_as_it_was_given() -> None:
    recorder = RecordingScheduler(Scheduler(SchedulerConfig(4, 2, 8, 4, 8, 17)))
    recorder.cancel("nobody", 5, index=2, ending=Finished("stop"))
    assert recorder.inputs == [Cancel(5, "nobody", "finished", "stop", 2)]


def _replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda line: line.replace(old, new, 1)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        (Plan, lambda line: line[: len(line) // 2], "is no JSON"),
        (Plan, lambda line: b"[" * 99_999, "is no JSON"),
        (Plan, lambda line: b"[]\n", "must be an object"),
        (Commit, _replace(b"commit", b"comit"), "must be an object with one of submit"),
        (Commit, _replace(b'"now":', b'"then":'), "commit has no 'then'"),
        (Lose, _replace(b'"now":', b'"now":"x","step":'), "lose.now must be of type int"),
        (Submit, _replace(b'"prompt":[', b'"prompt":[1.5,'), "must be of type int, not 1.5"),
        (Cancel, _replace(b'"ending":"', b'"ending":"un'), "cancel.ending must be one of"),
        (Plan, lambda line: b'{"plan":{"now":1,"iterations":1}}\n', "say why there is none"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(
    kind: type, damage: Callable[[bytes], bytes], words: str, written: Path, tmp_path: Path
) -> None:
    inputs = read_recording(written).inputs
    lines = written.read_bytes().splitlines(keepends=True)
    at = 1 + next(place for place, one in enumerate(inputs) if type(one) is kind)
    lines[at] = damage(lines[at])
    if not lines[at].endswith(b"\n"):
        lines[at] += b"\n"
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(InvalidParameter, match=f"line {at + 1}: .*{words}"):
        read_recording(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b'{"recording":{"version":99}}\n', "line 1: is of version 99"),
        (b'{"plan":{}}\n', "line 1: .*the header"),
        (b'{"recording":{"model":"m"}}\n', "line 1: recording lacks 'config'"),
        (b'{"recording":', "line 1: is cut short"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(text: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(text)
    with pytest.raises(InvalidParameter, match=words):
        read_recording(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="cannot be read"):
        read_recording(tmp_path / "nothing.jsonl")
    recording = Recording(Header("m", SchedulerConfig(4, 2, 8, 4, 8, 17)), ())
    (tmp_path / "file").write_bytes(b"")
    for folder in ("no", "file"):
        with pytest.raises(InvalidParameter, match="cannot be written"):
            write_recording(recording, tmp_path / folder / "where.jsonl")
