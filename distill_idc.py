"""Distil a data set in stages by matching gradients class by class: PDD+IDC.

    # CIFAR-10, 10 images per class in 5 stages of 2
    python -u distill_idc.py --reproduce -d cifar10 -f 2 --ipc 2 --data_dir data --tag progressive --niter 2000

Each stage learns ipc images of every class, conditioned on the frozen ones of the stages before: the networks whose
gradients are matched are first trained on the earlier unions. The same command again continues an interrupted run;
--start-interval i begins at stage i (from 0) from what is on disk. The files are
results/{dataset}/{folder}/interval_{i}_data.pt: [images (N, C, H, W) in [0, 1], labels (N,)], class after class.

    # all GPUs of a machine: the classes of every sweep and the networks of transitions and evaluations are spread
    torchrun --standalone --nproc_per_node=gpu distill_idc.py …
"""

import time

import torch

import utils.options as o
from utils import distributed, files, formation, idc, idc_options, progressive, report, results, training
from utils.augment import DSA
from utils.errors import UserError
from utils.gradient_matching import matching_loss, sweep
from utils.runtime import choose_device, stream, to_device

SAVE_EVERY = 50  # outer iterations
MEMORY = "--batch_syn_max, --batch_real, --batch_size, --transition_batch 1 or a smaller --width"  # lower it


def parse():
    parser = o.Parser(__doc__)
    defaults = idc_options.add(parser, "begin at this stage (from 0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a device name")
    machine.add_argument(
        "--checkpoint_minutes", type=o.RATE, default=10.0, help="minutes between two saves of the state"
    )
    machine.add_argument("--dry_run", action="store_true", help="print options, inputs, outputs and sizes, then stop")
    o.add_selection(parser.add_argument_group("evaluation in a stage"))
    extra = parser.add_argument_group("speed")
    extra.add_argument(
        "--transition_batch",
        type=o.COUNT,
        default=1,
        help="outer iterations whose networks are trained on the earlier unions together",
    )
    extra.add_argument(
        "--transition_pool",
        type=o.NATURAL,
        default=0,
        help="train this many networks on the earlier "
        "unions once and use them in turn; 0 trains a new one for every outer iteration, as published",
    )
    extra.add_argument("--pretrain", action="store_true", help="make the networks of --pt_from and --pt_num, then stop")
    options = idc_options.resolve(parser.parse_args(), defaults, parser)
    if options.start_interval >= options.num_intervals:
        parser.error(
            f"--start-interval {options.start_interval}: expected less than --num-intervals {options.num_intervals}"
        )
    return options


def main():
    options = parse()
    device = choose_device(options.device)
    if options.phase >= 0 or options.nclass_sub >= 0:
        report.say(
            "note: --phase and --nclass_sub change nothing: one command learns all classes, over many processes "
            "where torchrun starts it"
        )
    real = o.select(options, idc.load_data(options, device))
    folder = idc.save_folder(options)
    run = Run(options, real, folder)
    if options.pretrain:
        run.pretrain()
        return
    run.check()
    if options.dry_run:
        report.dry_run(
            options,
            {"data": idc_options.data_folder(options)},
            folder,
            f"{options.num_intervals} stages of {run.iterations} outer iterations of {options.inner_loop} "
            f"sweeps over {real.num_classes} classes",
            run.disk(),
        )
        return
    files.need_disk(folder, run.disk(), "the results")
    with files.locked(folder):
        free = (*o.FREE, *idc.FREE)
        distributed.first(lambda: files.claim(folder, vars(options), free=free, since=progressive.SINCE))
        distributed.first(lambda: results.save_facts(folder, real))
        distributed.first(lambda: idc.write_arguments(folder, options))
        for stage in range(options.start_interval, options.num_intervals):
            run.stage(stage)
    report.show(f"{folder}: done, {options.num_intervals} stages")


class Run:
    """The stages of one distillation."""

    def __init__(self, options, real, folder):
        self.options, self.real, self.folder = options, real, folder
        self.device = real.train.images.device
        self.iterations = max(1, int(options.niter * 100 / options.inner_loop + 1e-9))
        self.augment = DSA(options.aug_type, "idc")
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in real.statistics)
        idc.check_network(options, real)

    def check(self):
        """Refuse what cannot work before anything is written."""
        options, first = self.options, self.options.start_interval
        if first:
            idc.load_union(self.folder, first - 1, self.real, options.ipc)
        if options.pt_from >= 0:
            for number in range(options.pt_num):
                idc.load_pretrained(options, self.real, number)
        formation.new_images(
            self.real, options.ipc, options.init, options.factor, stream(options.seed, "subset", first)
        )

    def new_images(self, stage):
        """Return the images that `stage` starts from, (K, ipc, C, H, W)."""
        options = self.options
        rng = stream(options.seed, "subset", stage)
        return formation.new_images(self.real, options.ipc, options.init, options.factor, rng)

    def disk(self):
        """Return the bytes that the results take."""
        stages = self.options.num_intervals
        size = self.real.num_classes * self.options.ipc * self.real.channel * self.real.im_size**2 * 4
        return size * (stages * (stages + 1) // 2 + 3)

    def stage(self, stage):
        """Learn the images of `stage` (from 0) and write its union."""
        options, folder = self.options, self.folder
        saved = folder / f"interval_{stage}_checkpoint.pt"
        if idc.read_summary(folder, stage):
            idc.load_union(folder, stage, self.real, options.ipc)
            saved.unlink(missing_ok=True)  # of a run that ended before it could
            report.say(f"stage {stage}: done already")
            return
        earlier = None
        if stage:
            earlier = idc.load_union(folder, stage - 1, self.real, options.ipc).to(self.device)
        for path in (folder / f"interval_{before}_metrics.jsonl" for before in range(stage)):
            if path.exists():  # log.txt will hold them
                files.read_rows(path)
        learned = self.new_images(stage)
        checkpoint = files.Checkpoint(saved, options.checkpoint_minutes, vars(options), (*o.FREE, *idc.FREE))
        Learner(self, stage, earlier, learned, checkpoint).learn()
        done = {"stage": stage, **progressive.selection(options), "iterations": self.iterations, "complete": True}
        distributed.first(lambda: files.write_json(idc.summary_path(folder, stage), done))
        checkpoint.clear()

    def network(self, *keys):
        """Return a network of the distillation at its start."""
        options = self.options
        if options.pt_from >= 0:
            number = int(stream(options.seed, "pretrained", *keys).integers(options.pt_num))
            return idc.load_pretrained(options, self.real, number)
        return idc.new_network(options, self.real, *keys)

    def pretrain(self):
        """Train pt_num networks on real pictures for pt_from epochs and save them."""
        options = self.options
        if options.pt_from < 1:
            raise UserError("--pretrain: expected --pt_from EPOCHS, the epochs to train, found none")
        recipe = progressive.idc_recipe(options, options.pt_from, real_pictures=True)
        for number in distributed.share(range(options.pt_num)):
            path = idc.pretrained_path(options, number)
            if path.exists():
                report.say(f"{path}: there already")
                continue
            network = idc.new_network(options, self.real, "pretrain", number)
            progress = report.Progress(recipe.epochs, f"pretraining network {number + 1}/{options.pt_num}, epoch")
            training.train(
                network,
                self.real.train,
                recipe,
                options.seed,
                ("pretrain", number),
                each_epoch=lambda _epoch, loss, progress=progress: progress.update(loss=loss),
            )
            progress.close()
            files.save(path, idc.on_cpu(network.state_dict()))
            report.say(f"{path}: test accuracy {training.accuracy(network, self.real.test):.2f} %")


class Learner:
    """The outer iterations of one stage.

    Args:
        run: `Run`.
        stage: from 0.
        earlier: (K, ipc, stage, C, H, W) the union before, None in stage 0.
        learned: (K, ipc, C, H, W) the new images, changed in place.
        checkpoint: `files.Checkpoint`.
    """

    def __init__(self, run, stage, earlier, learned, checkpoint):
        self.run, self.options, self.real = run, run.options, run.real
        self.stage, self.earlier, self.learned = stage, earlier, learned
        self.checkpoint = checkpoint
        self.velocity = torch.zeros_like(learned)
        self.iteration, self.inner, self.total = 0, 0, torch.zeros((), device=learned.device)
        self.pending = False  # an evaluation of the saved union is due
        self.network, self.optimizer = None, None
        self.log = None
        self.started = {}  # networks before their first sweep, by the number of their outer iteration
        self.recipe = progressive.idc_recipe(self.options, self.options.net_epoch, real_pictures=True)

    def state(self):
        # Before its first sweep an outer iteration makes its network again; after it, and with fix_iter, it needs it.
        network = self.network if self.inner or self.keeps_network() else None
        return {
            "iteration": self.iteration,
            "inner": self.inner,
            "total": self.total,
            "pending": self.pending,
            "learned": self.learned,
            "velocity": self.velocity,
            "network": network.state_dict() if network else None,
            "optimizer": self.optimizer.state_dict() if network else None,
            "rows": self.log.rows,
            "wandb": self.log.run_id,
        }

    def restore(self, saved):
        for name in ("iteration", "inner", "total", "pending"):
            setattr(self, name, saved[name])
        self.learned.copy_(saved["learned"])
        self.velocity.copy_(saved["velocity"])
        if saved["network"] is not None:
            self.network = self.run.network("student", self.stage, self.iteration)
            self.network.load_state_dict(saved["network"])
            self.optimizer = training.optimizer_for(self.network, self.recipe)
            self.optimizer.load_state_dict(saved["optimizer"])

    def keeps_network(self):
        """True where this outer iteration goes on with the network of the one before (fix_iter)."""
        return self.options.fix_iter > 1 and self.iteration % self.options.fix_iter != 0 and self.network is not None

    def learn(self):
        options, stage, run = self.options, self.stage, self.run
        with self.checkpoint.loop("learning", stage, self.state) as saved:
            self.log = report.Log(
                run.folder / f"interval_{stage}_metrics.jsonl",
                saved["rows"] if saved else 0,
                options.wandb,
                vars(options),
                saved["wandb"] if saved else None,
            )
            if saved:
                self.restore(saved)
            else:
                self.save_picture("init")
                self.pending = options.test
            progress = report.Progress(run.iterations, f"stage {stage}, outer iteration", self.iteration)
            while True:
                if self.pending:
                    self.evaluate(progress)
                    self.pending = False
                if self.iteration == run.iterations:
                    break
                begun = time.monotonic()
                self.checkpoint.tick()
                loss = self.outer_iteration()
                if options.time:
                    progress.say(f"outer iteration {self.iteration}: {time.monotonic() - begun:.2f} s")
                progress.update(loss=loss)
            progress.close()
            self.log.close()

    def outer_iteration(self):
        """One network: its start, inner_loop sweeps, its training between them. Returns the mean loss of a sweep."""
        options = self.options
        if not self.inner:
            self.total = torch.zeros((), device=self.learned.device)
            self.learned.clamp_(0, 1)
            if not self.keeps_network():
                self.network = None  # not this iteration's: a save while its own is made leaves it out
                self.network = self.start_network()
                self.optimizer = training.optimizer_for(self.network, self.recipe)
        while self.inner < options.inner_loop:
            if self.inner:
                self.checkpoint.tick()
            # Rank 0 trains the network: the others' copies would drift from it on GPUs.
            distributed.copy_from_first(idc.floats_of(self.network))
            rng = stream(options.seed, "sweep", self.stage, self.iteration, self.inner)
            self.total = self.total + sweep(
                self.learned,
                self.velocity,
                options.lr_img_scaled,
                options.mom_img,
                lambda images, rng=rng: self.gradients(images, rng),
            )
            if distributed.is_first():
                self.train_on_real()
            self.inner += 1
        loss = self.total / options.inner_loop
        if not bool(torch.isfinite(loss)) or not bool(self.learned.isfinite().all()):
            raise UserError(
                f"stage {self.stage}, outer iteration {self.iteration}: the loss or an image became NaN or infinite; "
                "the files saved before are kept; lower --lr_img or --lr"
            )
        self.iteration, self.inner = self.iteration + 1, 0
        last = self.iteration == self.run.iterations
        if self.iteration % options.print_freq == 0 or last:
            self.log.write(stage=self.stage, iteration=self.iteration, loss=float(loss))
        if self.iteration % SAVE_EVERY == 0 or last:
            self.save()
            self.pending = True
        return loss

    def start_network(self):
        """Return the network of this outer iteration, trained on the earlier unions and for `early` real epochs."""
        options = self.options
        number = self.iteration % options.transition_pool if options.transition_pool else self.iteration
        network = self.run.network("student", self.stage, number)
        if self.stage or options.early:
            if number not in self.started:
                if not options.transition_pool:
                    self.started.clear()
                self.start_networks(self.ahead(number))
            network.load_state_dict(self.started[number])
        return network

    def ahead(self, number):
        """Return the networks from `number` on that are started together: transition_batch of them on every rank."""
        options = self.options
        step = 1 if options.transition_pool else max(1, options.fix_iter)
        limit = options.transition_pool or self.run.iterations
        return range(number, limit, step)[: options.transition_batch * distributed.size()]

    def start_networks(self, numbers):
        """Train the networks of the outer iterations `numbers`, spread over the ranks."""
        hands = distributed.deal(numbers)
        found = self.checkpoint.spread("starts", self.stage, hands, self.train_starts)
        for hand, states in zip(hands, found, strict=True):
            self.started |= dict(zip(hand, states, strict=True))

    def train_starts(self, numbers, checkpoint):
        """Train the networks of the outer iterations `numbers` on each earlier union in turn, then on real pictures.

        Returns:
            List of their states, on the CPU.
        """
        options = self.options
        recipe = progressive.idc_recipe(options, max(1, options.epochs // 5))
        members = [self.run.network("student", self.stage, number) for number in numbers]
        optimizers = None
        for before in range(self.stage):
            source = self.source(self.earlier[:, :, : before + 1])
            keys = [("earlier", self.stage, number, before) for number in numbers]
            optimizers = training.train_together(members, source, recipe, options.seed, keys, optimizers, checkpoint)
        if options.early:
            recipe = progressive.idc_recipe(options, options.early, real_pictures=True)
            for number, member in zip(numbers, members, strict=True):
                keys = ("early", self.stage, number)
                training.train(member, self.real.train, recipe, options.seed, keys, checkpoint=checkpoint)
        return [idc.on_cpu(member.state_dict()) for member in members]

    def source(self, union):
        """Return the decoded pictures of a union (K, n, stages, C, H, W) to train on."""
        images = union.flatten(1, 2).flatten(0, 1)
        return self.real.source(
            *formation.decode_union(images, self.real.num_classes, self.options.factor, self.options.decode_type)
        )

    def gradients(self, images, rng):
        """Return losses (K,) and gradients of `images` (K, n, C, H, W), each class with its own real batch.

        The classes are spread over the ranks, and every rank has all results.
        """
        options, real = self.options, self.real
        draws = [self.draw(label, rng) for label in range(real.num_classes)]
        own = distributed.share(range(real.num_classes))
        if options.norm_type == "sn":
            # A forward pass moves the norm's vectors, which the next class then starts from.
            own = range(real.num_classes if distributed.is_first() else 0)
        losses, gradients = images.new_zeros(real.num_classes), torch.zeros_like(images)
        for label in own:
            index, chosen, augmentation = draws[label]
            block, learned = self.block(label, images[label])
            decoded = formation.decode_class(block, options.factor, options.decode_type, options.batch_syn_max)
            if chosen is not None:
                decoded = decoded[to_device(chosen, images.device)]
            pictures = real.train.images[to_device(index, images.device)]
            both = torch.cat([pictures.float() / 255, decoded]).sub(self.run.mean).div(self.run.std)
            both = self.run.augment.apply(both, augmentation)
            loss = matching_loss(
                self.network,
                both[: len(index)].detach(),
                both[len(index) :],
                label,
                options.match,
                options.metric,
                options.bias,
                options.fc,
                options.f_idx,
            )
            # A random cut may leave out every learned image of the class.
            (gradient,) = torch.autograd.grad(loss, learned, allow_unused=True)
            losses[label] = loss.detach()
            if gradient is not None:
                gradients[label] = gradient
        return distributed.sum_(losses), distributed.sum_(gradients)

    def draw(self, label, rng):
        """Draw how a class is matched: its real pictures, the cut of its decoded ones (None: all), the augmentation."""
        options, indices = self.options, self.real.class_indices[label]
        index = rng.choice(indices, min(options.batch_real, len(indices)), replace=False)
        images = options.ipc * (self.stage + 1)
        pieces = formation.plan(images, options.factor, options.decode_type, options.batch_syn_max)
        decoded = sum((last - first) * factor**2 for first, last, factor in pieces)
        chosen = rng.permutation(decoded)[: options.batch_syn_max] if decoded > options.batch_syn_max else None
        return index, chosen, self.run.augment.draw(1, rng)

    def block(self, label, images):
        """Return the class's block of the union, slot by slot, and the leaf in it that is learned."""
        learned = images.detach().requires_grad_()
        if self.earlier is None:
            return learned, learned
        return torch.cat([self.earlier[label], learned[:, None]], dim=1).flatten(0, 1), learned

    def train_on_real(self):
        """Train the network on n_data real pictures, net_epoch times."""
        options = self.options
        for epoch in range(options.net_epoch):
            rng = stream(options.seed, "real", self.stage, self.iteration, self.inner, epoch)
            chosen = rng.choice(len(self.real.train), min(options.n_data, len(self.real.train)), replace=False)
            index = to_device(chosen, self.learned.device)
            training.train_epoch(self.network, self.optimizer, self.real.train, self.recipe, rng, index=index)

    def union(self):
        """Return the union of this stage (K, n, stages, C, H, W)."""
        new = self.learned.detach().clamp(0, 1)[:, :, None]
        return new if self.earlier is None else torch.cat([self.earlier, new], dim=2)

    def labels(self):
        return torch.arange(self.real.num_classes).repeat_interleave(self.options.ipc)

    def save(self):
        """Write the union and the picture of its newest images."""
        if distributed.is_first():
            idc.save_union(self.run.folder, self.stage, self.union())
        self.save_picture(f"img{self.iteration}")

    def save_picture(self, name):
        """Write the picture of the newest images."""
        if distributed.is_first():
            path = self.run.folder / f"interval_{self.stage}_{name}.png"
            report.save_grid(path, self.learned.flatten(0, 1), self.labels())

    def evaluate(self, progress):
        """Train `repeat` networks through the unions in order and note their accuracies after the last."""
        options = self.options
        union = self.union()
        sources = [self.source(union[:, :, : last + 1]) for last in range(self.stage + 1)]
        recipe = progressive.idc_recipe(options, options.epochs)

        def train(k, checkpoint):
            keys = ("evaluation", self.stage, self.iteration, k)
            network = idc.new_network(options, self.real, *keys)
            accuracies = progressive.staged_accuracies(
                network, sources, lambda _stage: recipe, self.real.selection, options.seed, keys, checkpoint
            )
            if options.save_ckpt:
                files.save(self.run.folder / f"interval_{self.stage}_network_{k}.pt", idc.on_cpu(network.state_dict()))
            return accuracies[-1]

        results = self.checkpoint.spread("evaluation", self.iteration, list(range(options.repeat)), train)
        mean, std = report.mean_std(results)
        self.log.write(stage=self.stage, iteration=self.iteration, accuracy_mean=mean, accuracy_std=std)
        distributed.first(lambda: idc.write_log(self.run.folder))
        progress.say(
            f"stage {self.stage}, outer iteration {self.iteration}: {progressive.SHOWN[options.select_on]} accuracy "
            f"{mean:.2f} ± {std:.2f} %"
        )


if __name__ == "__main__":
    distributed.run(main, MEMORY)
