"""Trajectory matching (MTT, Cazenavette et al., CVPR 2022) with an exact adjoint instead of one long graph.

The student makes N steps θ_{i+1} = θ_i − η g(θ_i, x_i) with g the gradient of the cross-entropy on minibatch x_i;
the loss is L = ‖θ_N − θ*‖² / ‖θ_0 − θ*‖². Its derivatives follow from the adjoint recursion

    λ_N = ∂L/∂θ_N,   λ_i = λ_{i+1} − η H_i λ_{i+1},
    ∂L/∂x_i = −η (∂g/∂x_i)ᵀ λ_{i+1},   ∂L/∂y_i = −η (∂g/∂y_i)ᵀ λ_{i+1},   ∂L/∂η = −Σ_i ⟨g_i, λ_{i+1}⟩

for which one step's graph at a time is enough: memory does not grow with N, for the θ_i are offloaded to a file (CPU)
or to the host's memory (GPU). Steps whose graph is retained from the forward pass are not computed again.
The result is the gradient of plain unrolling, not an approximation of it.

g, H_i λ and the derivatives with respect to the inputs are sums over the minibatch. So several ranks can share a
student: each holds the graphs of its part of every minibatch, and the parts of g and H_i λ are summed over the ranks.
"""

import dataclasses

import torch

from networks.layers import has_batch_statistics

from .augment import DSA, random_windows
from .memory import Stack, free_memory, saved_bytes
from .run import distributed
from .run.device import to_device
from .run.distributed import ALONE
from .run.errors import UserError
from .run.streams import stream


@dataclasses.dataclass(frozen=True)
class Step:
    """One student step: which images of the union it sees, and the augmentation drawn for them.

    Attributes:
        index: (B,) int64, positions in the union, each at most once.
        augment: function of images (B, C, H, W) to the student's input (B', C, h, w); B' a multiple of B (texture
            mode draws several windows of each canvas).
    """

    index: torch.Tensor
    augment: callable

    def rows(self, count):
        """Return the positions in the union of the `count` inputs of this step."""
        return self.index if count == len(self.index) else self.index.repeat(count // len(self.index))


def plan_batches(total, batch, steps, rng):
    """Draw the minibatches of one iteration: random permutations of the union, cut into batches.

    As published, the batches of a permutation are taken from its end.

    Args:
        total: images of the union.
        batch: images in a minibatch; the first of a permutation may be smaller.
        steps: student steps.
        rng: numpy.random.Generator.

    Returns:
        List of `steps` int64 arrays.
    """
    chunks = []
    while len(chunks) < steps:
        order = rng.permutation(total)
        chunks += [order[start : start + batch] for start in reversed(range(0, total, batch))]
    return chunks[:steps]


def match(
    student,
    start,
    target,
    syn_lr,
    images,
    labels,
    steps,
    first_learned=0,
    retained_graphs=0,
    slice_size=None,
    team=ALONE,
):
    """One matching iteration: the loss and its exact gradients.

    Args:
        student: `ReparamModule`.
        start, target: (numel,) parameters that the student starts from, and those to arrive at.
        syn_lr: 0-dim tensor η.
        images, labels: (N, C, H, W) and (N,) int64 or (N, K) probabilities, the union of all stages in network space.
        steps: list of `Step`.
        first_learned: images before this position are frozen; they get no gradient.
        retained_graphs: how many of the last steps keep their graph in the forward pass (0: constant memory;
            len(steps): the speed and memory of plain unrolling).
        slice_size: images of a minibatch whose graph is held at once; None for all. Exact for every network
            without batch statistics.
        team: `Team` of ranks that share the iteration, with equal arguments but retained_graphs; exact likewise.

    Returns:
        (loss 0-dim, gradient of images[first_learned:], gradient of syn_lr 0-dim), with probabilities also that of
        labels[first_learned:], all detached. In a team the loss is the whole one; its ranks' gradients add up.
    """
    thetas, retained = Stack(), {}
    theta, descent = start, -syn_lr
    for number, step in enumerate(steps):
        keep = number >= len(steps) - retained_graphs
        inputs, slices = _gradients(student, theta, images, labels, step, slice_size, keep, team)
        if keep:
            retained[number] = inputs, (slices := list(slices))
        else:
            thetas.push(theta)
        own = _total((gradient for gradient, _ in slices), theta)
        whole = team.all_reduce_sum(own.clone()) if team.count > 1 else own  # a retained gradient stays as it is
        theta = torch.addcmul(theta, whole, descent)

    scale = 1 / (start - target).square().sum()
    loss = (theta - target).square().sum() * scale
    adjoint = 2 * scale * (theta - target)
    images_gradient, lr_gradients = torch.zeros_like(images), []
    labels_gradient = torch.zeros_like(labels) if labels.is_floating_point() else None
    for number in reversed(range(len(steps))):
        if number in retained:
            inputs, slices = retained.pop(number)
        else:
            theta = thetas.pop(start)
            inputs, slices = _gradients(student, theta, images, labels, steps[number], slice_size, True, team)
        of_slices, products = list(_backwards(slices, adjoint, descent, number > 0)), ()  # λ_0 is never used
        if of_slices:
            of_lr, products, of_inputs, *of_labels = zip(*of_slices, strict=True)
            lr_gradients += of_lr
            images_gradient.index_add_(0, steps[number].index, _pull_back(*inputs, of_inputs, team))
            if of_labels:  # which are probabilities
                rows, part = steps[number].rows(len(inputs[1])), team.part(len(inputs[1]))
                labels_gradient.index_add_(0, rows[slice(*part)], torch.cat(of_labels[0]))
        if number:
            adjoint = adjoint + team.all_reduce_sum(_total(products, adjoint))
    # Frozen images take part in the sums as well: telling them apart would wait for the device in every step.
    gradients = [] if labels_gradient is None else [labels_gradient[first_learned:]]
    lr_gradient = -torch.stack(lr_gradients).sum() if lr_gradients else torch.zeros_like(syn_lr)
    return loss, images_gradient[first_learned:], lr_gradient, *gradients


def _total(tensors, like):
    """Return the sum of `tensors`, zeros if a rank has none."""
    total = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return torch.zeros_like(like) if total is None else total


def _gradients(student, theta, images, labels, step, slice_size, keep, team):
    """Return what this rank's part of a minibatch adds to g(θ, x), slice by slice.

    Returns:
        ((chosen images, augmented images), iterator over (gradient (numel,), `vjp`) of the slices, each made when it is
        asked for). If `keep` is False the vjps are None.
    """
    chosen = images[step.index].requires_grad_(keep)
    with torch.set_grad_enabled(keep):
        augmented = step.augment(chosen)
    inputs, targets = augmented.detach(), labels[step.rows(len(augmented))]
    first, last = team.part(len(inputs))
    size = slice_size or len(inputs)
    parts = [slice(begin, min(begin + size, last)) for begin in range(first, last, size)]
    slices = (student.gradient(theta, inputs[part], targets[part], len(inputs), keep) for part in parts)
    return (chosen, augmented), slices


def _backwards(slices, adjoint, descent, of_parameters):
    """Yield ⟨g, λ⟩ and the products of g's derivatives with −η λ for each slice, one after the other."""
    for gradient, vjp in slices:
        yield gradient @ adjoint, *vjp(adjoint * descent, of_parameters)
        del gradient, vjp  # the graph of one slice goes before the next one's is made


def _pull_back(chosen, augmented, gradients, team):
    """Return the gradient of the chosen images from those of the slices of this rank's part of the augmented ones."""
    gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
    if len(gradient) < len(augmented):
        first, last = team.part(len(augmented))
        own, gradient = gradient, torch.zeros_like(augmented)
        gradient[first:last] = own
    return gradient if augmented is chosen else torch.autograd.grad(augmented, chosen, gradient)[0]


def choose_retained_graphs(wanted, student, start, synthetic, steps, slice_size=None, team=ALONE):
    """Turn the option --kept_steps into a number: `auto` retains as many graphs as fit half of the free memory.

    The graph of one step is measured, not estimated: the bytes of all tensors that it saves for the backward pass.

    Returns:
        int, 0 to len(steps).
    """
    if wanted != "auto":
        return min(int(wanted), len(steps))
    largest = max(steps, key=lambda step: len(step.index))
    size = graph_bytes(student, start, synthetic.images, synthetic.targets, largest, slice_size, team)
    # The backward pass through a graph needs about as much again while it runs.
    fits = int(free_memory(start.device) / 2 / max(size, 1)) - 1
    return max(0, min(fits, len(steps)))


def graph_bytes(student, theta, images, labels, step, slice_size=None, team=ALONE):
    """Return the bytes that one student step keeps; arguments as for `match`, also on the device meta."""

    def graph():
        inputs, slices = _gradients(student, theta, images, labels, step, slice_size, True, team)
        return inputs, list(slices)

    return saved_bytes(graph)


@dataclasses.dataclass(frozen=True)
class TrajectoryMatchConfig:
    """How PDD+MTT matches.

    Attributes:
        batch_syn: images of a student's minibatch.
        syn_steps: student steps N.
        expert_epochs: from the expert's start entry to its target entry.
        max_start_epoch: number of possible start epochs, the first of them `first_start_epoch`.
        grow_iterations: iterations over which the possible start epochs grow from one to all (DATM); 0: all at once.
        dsa: applied to every minibatch; None for none.
        window, samples: of texture mode: pixels of the random windows shown of canvases (None: whole images), and how
            many of each.
        trajectories: experts whose gradients are averaged in one iteration.
        retained_graphs: number of student steps, or auto; see `choose_retained_graphs`.
        slice_size: as for `match`.
    """

    batch_syn: int
    syn_steps: int
    expert_epochs: int
    max_start_epoch: int
    first_start_epoch: int = 0
    grow_iterations: int = 0
    dsa: DSA | None = None
    window: int | None = None
    samples: int = 1
    trajectories: int = 1
    retained_graphs: int | str = "auto"
    slice_size: int | None = None


class TrajectoryMatcher:
    """Matches the trajectories of experts, spread over the ranks.

    Args:
        student: `ReparamModule`.
        experts: `Experts`.
        synthetic: `SyntheticSet` with syn_lr.
        config: `TrajectoryMatchConfig`.
        seed, stage: of the random streams.
    """

    def __init__(self, student, experts, synthetic, config, seed=0, stage=1):
        self.student, self.experts, self.synthetic, self.config = student, experts, synthetic, config
        self.seed, self.stage = seed, stage
        splits = not has_batch_statistics(student.network)
        self.team, self.trajectories = distributed.form_teams(config.trajectories, splits)
        self.retained_graphs = None

    def backward(self, iteration):
        """Fill learned.grad, syn_lr.grad and, with soft labels, learned_soft.grad of the set; returns the loss."""
        synthetic, config = self.synthetic, self.config
        total = [torch.zeros_like(value) for value in (synthetic.syn_lr, *synthetic.parameters)]
        for trajectory in self.trajectories:
            start, target, steps = self.plan(iteration * config.trajectories + trajectory)
            if self.retained_graphs is None:
                self.retained_graphs = choose_retained_graphs(
                    config.retained_graphs, self.student, start, synthetic, steps, config.slice_size, self.team
                )
            loss, *gradients = match(
                self.student,
                start,
                target,
                synthetic.syn_lr,
                synthetic.images,
                synthetic.targets,
                steps,
                synthetic.first_learned,
                self.retained_graphs,
                config.slice_size,
                self.team,
            )
            # Every rank of a team has the whole loss.
            found = [loss / self.team.count, *gradients]
            total = [whole.add_(part) for whole, part in zip(total, found, strict=True)]
        loss, *gradients = [distributed.all_reduce_sum(value).div_(config.trajectories) for value in total]
        for value, gradient in zip(synthetic.parameters, gradients, strict=True):
            value.grad = gradient
        return loss

    def plan(self, number):
        """Draw trajectory `number` of this stage: expert, start epoch, minibatches and their augmentation.

        Returns:
            (start parameters, target parameters, list of `Step`).
        """
        config, device = self.config, self.synthetic.images.device
        rng = stream(self.seed, "matching", self.stage, number)
        expert = self.experts.drawn(number, self._order(number), rng)
        epoch = config.first_start_epoch + int(rng.integers(self._start_epochs(number // config.trajectories)))
        start = self.experts.parameters(expert, epoch).to(device, non_blocking=True)
        target = self.experts.parameters(expert, epoch + config.expert_epochs).to(device, non_blocking=True)
        steps = []
        for index in plan_batches(len(self.synthetic), config.batch_syn, config.syn_steps, rng):
            steps.append(Step(to_device(index, device), self._augmentation(len(index), rng)))
        return start, target, steps

    def _start_epochs(self, iteration):
        """Return the number of possible start epochs."""
        count, grow = self.config.max_start_epoch, self.config.grow_iterations
        return count if iteration >= grow else 1 + (count - 1) * iteration // grow

    def loaded_experts(self, iteration):
        """Return the experts of the buffer file that `iteration` draws from, in their shuffled order."""
        number = iteration * self.config.trajectories
        return self.experts.in_memory(number, self._order(number))

    def _order(self, number):
        return self.experts.order(stream(self.seed, "experts", self.stage, number // len(self.experts)))

    def _augmentation(self, count, rng):
        """Draw the augmentation of a minibatch; returns a deterministic function of its images."""
        config = self.config
        window_seed = rng.integers(2**63) if config.window else None
        draw = config.dsa.draw(count * (config.samples if config.window else 1), rng) if config.dsa else []

        def augment(x):
            if config.window:
                x = random_windows(x, stream(window_seed), config.window, config.samples)
            return config.dsa.apply(x, draw) if draw else x

        return augment


def check_finite(iteration, loss, synthetic):
    """Stop before a broken value is saved.

    Raises:
        UserError: loss, an image or syn_lr is NaN or infinite; the message names the options to change.
    """
    values = {"the loss": loss, "a synthetic image": synthetic.learned, "syn_lr": synthetic.syn_lr}
    values |= {} if synthetic.soft is None else {"a label": synthetic.soft}
    broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(
            f"iteration {iteration}: {' and '.join(broken)} became NaN or infinite; the files of the last good "
            "evaluation are kept; lower --lr_img, --lr_lr or --lr_teacher, or raise --expert_epochs (for few real "
            "images: experts with --batch_train 16 and more --train_epochs, then --lr_lr 1e-06 --lr_img 100)"
        )
