import os
import signal

import pytest
import torch

from utils import training
from utils.data.datasets import ImageDataset
from utils.run import files, signals
from utils.run.checkpoint import Checkpoint, finish_each, forget_finished
from utils.run.errors import Interrupted, UserError

CONFIG = {"lr": 0.1, "strategy": ["a", "b"], "device": "cpu"}


@pytest.fixture(autouse=True)
def own_handlers():
    """Handle signals as a script does; afterwards everything is as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    assert signals.received is None


class Learning:
    """A learning loop: a tensor changed in place by SGD with momentum, a best value, and the path it took."""

    def __init__(self, path, minutes=0, config=CONFIG):
        torch.manual_seed(0)
        self.images = torch.randn(5, dtype=torch.float64)
        self.optimizer = torch.optim.SGD([self.images], 0.1, 0.9)
        self.best = {"loss": float("inf"), "iteration": None}
        self.seen = []
        objects = {"images": self.images, "optimizer": self.optimizer, "best": self.best}
        self.checkpoint = Checkpoint(path, minutes, config, **objects)

    def run(self, count=10, each=lambda iteration: None):
        with self.checkpoint:
            for iteration in self.checkpoint.iterations(count):
                self.seen.append(iteration)
                each(iteration)
                loss = float((self.images**2).sum())
                if loss < self.best["loss"]:
                    self.best |= {"loss": loss, "iteration": iteration}
                self.images.grad = 2 * self.images
                self.optimizer.step()
        return self.images.tolist(), dict(self.best)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


class Killed(BaseException):
    """What stands for SIGKILL: nobody catches it."""


def kill_at(moment):
    def each(iteration):
        if iteration == moment:
            raise Killed

    return each


@pytest.mark.parametrize("moment", range(10))
def test_a_killed_loop_goes_on_with_the_iteration_it_was_in(moment, path, tmp_path):
    expected = Learning(tmp_path / "other.pt").run()
    with pytest.raises(Killed):
        Learning(path).run(each=kill_at(moment))
    again = Learning(path)
    assert again.run() == expected
    assert again.seen == list(range(moment, 10))


def test_nothing_is_saved_before_its_time(path):
    with pytest.raises(Killed):
        Learning(path, minutes=60).run(each=kill_at(7))
    assert not path.exists()


def test_saves_are_timed_from_the_last_one(path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr("utils.run.checkpoint.time.monotonic", lambda: now[0])
    monkeypatch.setattr(files, "save", lambda _path, state: written.append(state["iteration"]))

    def each(_iteration):
        now[0] += 25.0

    Learning(path, minutes=1).run(each=each)
    assert written == [3, 6, 9]


def test_every_kind_of_object_is_restored_in_place(path):
    network = torch.nn.Linear(2, 3)
    tensor, counts = torch.tensor(1.5, requires_grad=True), {"a": 1}
    with Checkpoint(path, 10, CONFIG, tensor=tensor, counts=counts, network=network) as checkpoint:
        checkpoint.iteration = 4
        checkpoint.save()
    weight = network.weight.detach().clone()
    with torch.no_grad():
        tensor.fill_(9.0)
        network.weight.zero_()
    counts.update(a=7)
    with Checkpoint(path, 10, CONFIG, tensor=tensor, counts=counts, network=network) as checkpoint:
        assert checkpoint.iteration == 4 and list(checkpoint.iterations(6)) == [4, 5]
    assert float(tensor.detach()) == 1.5 and tensor.requires_grad and counts == {"a": 1}
    assert torch.equal(network.weight, weight)


def test_a_save_holds_the_values_of_its_time(path):
    tensor, counts = torch.zeros(10_000)[-3:], {"a": 1}
    with Checkpoint(path, 10, CONFIG, tensor=tensor, counts=counts) as checkpoint:
        checkpoint.save()
        tensor += 1
        counts["a"] = 2
    state = files.load(path)
    assert state["objects"]["tensor"].tolist() == [0, 0, 0] and state["objects"]["counts"] == {"a": 1}
    assert path.stat().st_size < 10_000  # of a view, only what it shows


def save_one(path):
    with pytest.raises(Killed):
        Learning(path).run(each=kill_at(3))
    return path.read_bytes()


def test_another_config_is_refused_and_named(path):
    before = save_one(path)
    with pytest.raises(UserError) as error:
        Learning(path, config=CONFIG | {"lr": 0.2}).run()
    assert str(error.value) == (
        f"{path}: expected the state of an interrupted run, found that of another run (lr 0.1 there, 0.2 now); "
        "delete it to begin this stage anew"
    )
    assert path.read_bytes() == before


def test_tuples_of_a_config_are_lists_in_the_file(path):
    config = CONFIG | {"strategy": ("a", "b")}
    with pytest.raises(Killed):
        Learning(path, config=config).run(each=kill_at(3))
    Learning(path, config=config).run()


def nudge(state):
    state["objects"]["images"][0] += 1e-9


@pytest.mark.parametrize(
    "change",
    [
        nudge,
        lambda state: state.update(iteration=5),
        lambda state: state["config"].update(lr=0.2),
        lambda state: state.pop("digest"),
        lambda state: state["objects"].pop("best"),
    ],
)
def test_a_changed_file_is_refused(change, path):
    save_one(path)
    state = files.load(path)
    change(state)
    files.save(path, state)
    with pytest.raises(
        UserError, match=r"found something else, a changed file, or one of an earlier version; delete it"
    ):
        Learning(path).run()


@pytest.mark.parametrize("value", [[1, 2], "text", torch.zeros(3), {}])
def test_other_contents_are_refused(value, path):
    files.save(path, value)
    with pytest.raises(UserError, match=f"{path}: expected the state of an interrupted run, found something else"):
        Learning(path).run()


def test_a_file_that_is_cut_off_is_refused(path):
    content = save_one(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{path}: expected the state of an interrupted run, found "):
        Learning(path).run()


# Signals --------------------------------------------------------------------------------------------------------------


def signal_at(moment, number=signal.SIGTERM):
    def each(iteration):
        if iteration == moment:
            os.kill(os.getpid(), number)

    return each


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", [0, 4])
def test_a_signal_stops_after_the_iteration_and_saves(moment, number, path, tmp_path):
    expected = Learning(tmp_path / "other.pt").run()
    learning = Learning(path, minutes=60)
    with pytest.raises(Interrupted) as stop:
        learning.run(each=signal_at(moment, number))
    assert stop.value.signal_number == number and stop.value.saved == path
    assert learning.seen == list(range(moment + 1))
    signals.listen()
    again = Learning(path, minutes=60)
    assert again.run() == expected and again.seen == list(range(moment + 1, 10))


def test_a_signal_in_the_last_iteration_lets_the_loop_end(path):
    learning = Learning(path, minutes=60)
    learning.run(each=signal_at(9))
    assert not path.exists()
    with pytest.raises(Interrupted) as stop:
        signals.stop_if_asked()
    assert stop.value.saved is None


@pytest.mark.parametrize("together", [False, True])
def test_a_signal_inside_a_nested_training_saves_the_iteration_around_it(together, path, tmp_path, monkeypatch):
    data = ImageDataset(torch.randn(6, 4), torch.arange(6) % 3)
    epochs, sent = [], []
    original = training.minibatches

    def minibatches(*arguments, **options):
        epochs.append(1)
        if len(epochs) == 2 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        yield from original(*arguments, **options)

    monkeypatch.setattr(training, "minibatches", minibatches)

    def evaluate(iteration):
        if iteration == 3:
            torch.manual_seed(1)
            members = [torch.nn.Linear(4, 3) for _ in range(2)]
            config = training.TrainConfig(5, 0.1)
            training.train_together(members, data, config, 0, [("a",), ("b",)], stacked=together)

    sent.append("not in this run")
    expected = Learning(tmp_path / "other.pt").run(each=evaluate)
    assert len(epochs) == 10  # of two networks
    epochs.clear(), sent.clear()
    learning = Learning(path, minutes=60)
    with pytest.raises(Interrupted) as stop:
        learning.run(each=evaluate)
    assert len(epochs) == 2 and stop.value.saved == path and learning.seen == [0, 1, 2, 3]
    signals.listen()
    again = Learning(path, minutes=60)
    assert again.run(each=evaluate) == expected and again.seen == list(range(3, 10))


def test_a_loop_left_by_an_error_is_not_saved_later(path):
    with pytest.raises(ZeroDivisionError):
        Learning(path, minutes=60).run(each=lambda iteration: 1 // 0)
    with pytest.raises(Interrupted) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.saved is None and not path.exists()


# Finished units of work -----------------------------------------------------------------------------------------------


class Work:
    """Notes which tasks are done; `stop_at` is killed."""

    def __init__(self, stop_at=None):
        self.done, self.stop_at = [], stop_at

    def __call__(self, task):
        if task == self.stop_at:
            raise Killed
        self.done.append(task)
        return {"task": task, "state": torch.full((2,), float(hash(task) % 100))}


def values(results):
    return [(found["task"], found["state"].tolist()) for found in results]


KEY = [1, "union", {"lr": 0.1}, torch.arange(3)]


@pytest.mark.parametrize("tasks", [[3, 1, 2], ["a", "b", "c"], [(0, 1), (2,), (3, 4)]])
def test_each_task_is_done_once_whatever_interrupts(tasks, tmp_path):
    expected = values(finish_each(tmp_path / "other", "work", KEY, tasks, Work()))
    assert [task for task, _ in expected] == tasks
    first, second, third = Work(tasks[1]), Work(tasks[2]), Work()
    for work in (first, second):
        with pytest.raises(Killed):
            finish_each(tmp_path / "here", "work", KEY, tasks, work)
    assert values(finish_each(tmp_path / "here", "work", KEY, tasks, third)) == expected
    assert [first.done, second.done, third.done] == [[task] for task in tasks]
    again = Work()
    assert values(finish_each(tmp_path / "here", "work", KEY, tasks, again)) == expected and again.done == []


def test_what_was_finished_for_another_key_or_task_is_forgotten(tmp_path):
    def done(key, tasks, name="work"):
        work = Work()
        finish_each(tmp_path, name, key, tasks, work)
        return work.done

    partial = tmp_path / "partial"
    assert done(KEY, [0, 1]) == [0, 1]
    assert done(KEY, [0, 1], name="other") == [0, 1]
    assert done([*KEY[:3], torch.tensor([0, 1, 3])], [0, 1]) == [0, 1]
    assert len(list(partial.glob("work-*"))) == 2  # no longer those of KEY
    assert done(KEY, [0, 1]) == [0, 1]
    assert done(KEY, [1, 2]) == [2]
    assert done(KEY, [0, 1]) == [0]
    assert done(KEY, [0, 1], name="other") == []


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "changed", "no digest", "list"])
def test_a_damaged_file_is_made_again(damage, tmp_path):
    expected = values(finish_each(tmp_path, "work", KEY, [0, 1, 2], Work()))
    paths = sorted((tmp_path / "partial").iterdir())
    content = {path: path.read_bytes() for path in paths}
    path = paths[1]
    state = files.load(path)
    broken = state["result"]["task"]
    if damage == "changed":
        state["result"]["state"] += 1
    elif damage == "no digest":
        del state["digest"]
    if damage in ("changed", "no digest", "list"):
        files.save(path, [1] if damage == "list" else state)
    else:
        path.write_bytes({"cut": content[path][:-50], "empty": b"", "text": b"hello"}[damage])
    work = Work()
    assert values(finish_each(tmp_path, "work", KEY, [0, 1, 2], work)) == expected
    assert work.done == [broken]
    assert {path: path.read_bytes() for path in paths} == content


def test_forgetting_leaves_other_work(tmp_path):
    finish_each(tmp_path, "work", KEY, [0], Work())
    finish_each(tmp_path, "other", KEY, [0], Work())
    forget_finished(tmp_path, "work")
    assert [path.name.partition("-")[0] for path in (tmp_path / "partial").iterdir()] == ["other"]
    forget_finished(tmp_path, "other")
    assert list(tmp_path.iterdir()) == []
    forget_finished(tmp_path, "other")


def test_a_signal_between_two_tasks_keeps_the_finished_ones(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", 60, CONFIG, best={})
    work = Work()

    def signalled(task):
        if task == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(task)

    with pytest.raises(Interrupted), checkpoint:
        finish_each(tmp_path, "work", KEY, [0, 1, 2], signalled)
    assert work.done == [0, 1] and checkpoint.path.exists()
    again = Work()
    finish_each(tmp_path, "work", KEY, [0, 1, 2], again)
    assert again.done == [2]
