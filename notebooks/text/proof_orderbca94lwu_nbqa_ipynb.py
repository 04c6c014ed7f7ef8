# %%NBQA-CELL-SEP5a09c6
seed = 0  # first seed; runs use seed, seed+1, …
n_seeds = 3  # how many seeds are run; one seed decides no claim
digits = 2  # digits of the first number
by = 1  # digits of the second number
tactics = 4  # tactics in every proof
hypotheses = 5  # hypotheses of every theorem
atoms = 5  # atoms in formulas
state_width = 5  # tokens of a written state; longer ones are left out
theorems = 1500  # theorems to learn from
multiplication_orders = ["sequential", "equivalent", "answer first", "random", "reversed"]  # orders of a multiplication
proof_orders = ["sequential", "state after tactic", "random", "reversed"]  # orders of a proof
permutation = 0  # seed of the one random order
width = 64  # width of the residual stream
layers = 2  # layers of the Llama
steps = 32  # training steps of every run
batch_size = 32  # samples in a batch
rates = [0.02]  # learning rates, chosen from for each order
n_validation = 20  # problems on which the rate is chosen
n_test = 60  # held-out problems of a task


# %%NBQA-CELL-SEP5a09c6
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

from midstream import figures
from midstream.data import implications
from midstream.data.worked import loses_supervision, multiplication
from midstream.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from midstream.papers.text import proof_order as paper
from midstream.running import open_chapter
from midstream.teaching import check
from midstream.train import Schedule, fit

figures.use_style()
torch.set_num_threads(max(1, min(8, torch.get_num_threads())))
run = open_chapter("proof_order", globals())
tables = run.result.tables
run.banner()


# %%NBQA-CELL-SEP5a09c6
counts = {
    verdict: sum(claim.direction == verdict for claim in run.record.claims) for verdict in ("holds", "unclear", "fails")
}
display(
    Markdown(
        f"Of the {len(run.record.claims)} claims checked here, **{counts['holds']} hold**, {counts['unclear']} stay "
        f"unclear and {counts['fails']} fail at this scale; the table is below."
    )
)


# %%NBQA-CELL-SEP5a09c6
products = multiplication(2, 1)
sample = products.tokens[987]  # 89 × 7; any row will do


def draw_order(order):
    blocks = paper.order_of(products, order, run.params.permutation)
    places = products.arrangement(blocks).tolist()
    bayes = list(paper.bayes_rows(products, blocks))
    start, known = (
        products.problem,
        [products.columns[place - products.problem] for place in places[products.problem :]],
    )
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9.6, 3.5), sharex=True, height_ratios=(1.35, 1))
    middle = {b: start + np.mean([i for i, column in enumerate(known) if column.block == b]) for b in blocks}
    lost = []
    for x, place in enumerate(places):
        column = known[x - start] if x >= start else None
        gone = column is not None and loses_supervision(column, blocks)
        color = GREY if column is None or column.kind == "tag" else ORANGE if gone else BLUE
        top.text(x, 0, products.vocabulary[sample[place]], ha="center", va="center", color=color, fontsize=11,
                 fontweight="normal" if color == GREY else "bold")  # fmt: skip
        for parent in column.parents if column is not None else ():
            bend = 0.35 if middle[parent] < x else -0.35
            arc = {"arrowstyle": "->", "color": color, "lw": 1, "alpha": 0.65, "connectionstyle": f"arc3,rad={-bend}"}
            top.annotate("", (x, 0.16), (middle[parent], 0.16), arrowprops=arc)
        if column is not None:
            bottom.bar(x, bayes[x - start]["one_step"], color=color, width=0.7)
        if gone:
            lost.append(f"{column.block} {column.kind}")
    top.set(ylim=(-0.25, 1.9), xlim=(-0.8, len(places) - 0.3))
    top.axis("off")
    top.set_title(f"{order}: {len(lost)} digits stand left of what they follow from")
    bottom.set(ylabel="Bayes loss (nats)", xticks=[], xlabel="reading direction →", ylim=(0, 2.5))
    said = ", ".join(lost) or "none"
    return figure, f"The tokens of one multiplication in the order {order}, with arrows from supervision; lost: {said}."


figures.explore(draw_order, order=["sequential", "answer first", "reversed", "random", "equivalent"])


# %%NBQA-CELL-SEP5a09c6
run.claims()


# %%NBQA-CELL-SEP5a09c6
sizes = run.result.scalars
display(
    Markdown(
        "The paper's orders, models and tables were not read, only its abstract: **every order here is inferred** from "
        f"it and is a parameter. In each task all orders read exactly as much: "
        f"{sizes['multiplication: tokens read in training']:,.0f} tokens of multiplications, "
        f"{sizes['proofs: tokens read in training']:,.0f} of proofs. “Does not rise” means: by less than "
        f"{paper.MARGIN:g} nats on average."
    )
)


# %%NBQA-CELL-SEP5a09c6
figures.source(loses_supervision)


# %%NBQA-CELL-SEP5a09c6
figures.source(paper.solution_losses)


# %%NBQA-CELL-SEP5a09c6
totals = tables["bayes"].groupby("order")["steps_alone"].sum()
backwards = tables["bayes"].query("order == 'reversed' and kind.str.startswith('result')")["steps_alone"]
display(
    Markdown(
        "The chain rule says the same without the problem: Bayes losses of all steps add up to "
        f"{totals.min():.3f} to {totals.max():.3f} nats in every order. In the reversed one the result alone takes "
        f"{backwards.sum():.2f} of them. **An order moves uncertainty, it makes none.**"
    )
)


# %%NBQA-CELL-SEP5a09c6
figures.source(implications.step)


# %%NBQA-CELL-SEP5a09c6
worked, theorems_drawn = implications.proofs(20, 5, steps=4, hypotheses=5, atoms=5, width=5)
theorem = theorems_drawn[0]
proof = implications.prove(theorem, 4) or []
print(", ".join(map(implications.show, theorem.hypotheses)), "⊢", implications.show(theorem.target))
state = implications.start(theorem)
for tactic in proof:
    print(f"  {' '.join(implications.written(state)):12}  {implications.show(tactic)}")
    state = implications.step(theorem, state, tactic)
print("checker:", implications.check(theorem, proof))
print("two tactics exchanged:", implications.check(theorem, [proof[1], proof[0], *proof[2:]]))


# %%NBQA-CELL-SEP5a09c6
generator = torch.Generator().manual_seed(3)
shuffled = products.tokens[torch.randperm(len(products.tokens), generator=generator)]
unseen, seen = shuffled[:100], shuffled[100:]
size = paper.Params(width=64, layers=2)


def learn_live(order):
    arrangement = products.arrangement(paper.order_of(products, order, 0))
    model = paper.untrained(len(products.vocabulary), size, seed=3)
    batches = paper.batches(seen[:, arrangement], 64, seed=3)
    schedule = Schedule(steps=90, learning_rate=0.005, muon=0.01)
    fit(
        model,
        batches,
        lambda m, rows: paper.solution_losses(m, rows, products.problem).mean(),
        schedule,
        precision="bfloat16",
    )
    rows = unseen[:, arrangement].to(model.device)
    with torch.no_grad():
        losses = paper.solution_losses(model, rows, products.problem).cpu()
    return rows.cpu(), losses


live = {order: learn_live(order) for order in ("sequential", "answer first")}


# %%NBQA-CELL-SEP5a09c6
figure, panels = plt.subplots(2, 1, figsize=(9.6, 3.6), sharey=True)
said = []
for axes, (order, (rows, losses)) in zip(panels, live.items(), strict=True):
    words = [products.vocabulary[token] for token in rows[0, products.problem :].tolist()]
    sure = (-losses).exp()
    axes.bar(range(len(words)), sure.mean(0), color=GREY, alpha=0.35, width=0.8)
    axes.plot(range(len(words)), sure[0], "o", color=BLUE if order == "sequential" else ORANGE, ms=6)
    axes.set(xticks=range(len(words)), xticklabels=words, ylim=(0, 1.05), ylabel="p(right token)")
    where = words.index("R")
    of_result = float(sure[:, where + 1 : where + 4].mean())
    axes.set_title(f"{order}: the result's digits get {of_result:.0%} on average", fontsize=11)
    said.append(f"{order}: mean probability of the result's digits {of_result:.2f}")
problem = " ".join(products.vocabulary[token] for token in unseen[0, 1 : products.problem].tolist())
figures.show(
    figure,
    "Probability of each right token of a multiplication after a short training, in two orders. "
    + "; ".join(said)
    + ".",
    f"Dots: {problem}, which neither model has seen. Grey bars: mean over 100 unseen products. Given all tokens before.",
)


# %%NBQA-CELL-SEP5a09c6
runs = tables["runs"][tables["runs"]["chosen"]]
names = {
    "sequential": "sequential",
    "equivalent": "equivalent (control)",
    "state after tactic": "state after its tactic",
    "answer first": "answer first",
    "random": "one random order",
    "reversed": "reversed",
}
figure, panels = plt.subplots(1, 2, figsize=(10.4, 3.2))
said = []
for axes, task in zip(panels, ("multiplication", "proofs"), strict=True):
    rows = runs[runs["task"] == task]
    order = {name: names[name] for name in paper.orders_of(run.result, task)}
    figures.bars(axes, rows, "success", "order", order, {"sequential": BLUE, "equivalent": GREEN})
    means = rows.groupby("order")["success"].mean()
    axes.set(xlim=(0, 1), xlabel={"multiplication": "results exactly right", "proofs": "proofs accepted"}[task])
    axes.set_title(f"{task}: best {means.idxmax()}, worst {means.idxmin()}", fontsize=11)
    said.append(task + ": " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()))
figures.show(
    figure,
    "Bars of the share of held-out problems solved, by order. " + "; ".join(said) + ".",
    "Thick lines: 95 % intervals over seeds; dots: seeds.",
)


# %%NBQA-CELL-SEP5a09c6
rates = runs.drop_duplicates(["task", "order"])[["task", "order", "rate"]]
chosen = "; ".join(f"{row.task}, {row.order}: {row.rate:g}" for row in rates.itertuples())
display(
    Markdown(
        f"Between the best and the worst order of a proof lie **{paper.gap(run.result)} points** (paper: 11), of a "
        f"multiplication {paper.gap(run.result, 'multiplication')}. Learning rates chosen: {chosen}."
    )
)


# %%NBQA-CELL-SEP5a09c6
def draw_losses(task):
    cells = paper.cells(run.result, task)
    listed = tables["losses"].query("task == @task and kind != 'tag'").sort_values("column")
    keys = list(dict.fromkeys(zip(listed["block"], listed["kind"], strict=True)))
    orders = paper.orders_of(run.result, task)
    mean = cells.groupby(["order", "block", "kind"])[["loss", "moved"]].mean()
    grid = np.array([[mean.loc[(order, *key), "loss"] for key in keys] for order in orders])
    figure, axes = plt.subplots(figsize=(10.4, 0.5 * len(orders) + 1.6))
    shade = axes.imshow(grid, cmap="Greys", vmin=0, vmax=max(2, grid.max()), aspect="auto")
    for y, order in enumerate(orders):
        for x, key in enumerate(keys):
            axes.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", fontsize=9,
                      color="white" if shade.norm(grid[y, x]) > 0.55 else "black")  # fmt: skip
            if mean.loc[(order, *key), "moved"]:
                axes.add_patch(plt.Rectangle((x - 0.45, y - 0.43), 0.9, 0.86, fill=False, ec=ORANGE, lw=2.5))
    labels = [
        block if kind in ("tactic", "state") else f"{block}\n{kind.replace('result ', 'digit ')}"
        for block, kind in keys
    ]
    axes.set_xticks(range(len(keys)), labels, fontsize=9)
    axes.set_yticks(range(len(orders)), [names[order] for order in orders])
    table = paper.rises(run.result, task)
    lost, kept = table[table["moved"]]["rise"].mean(), table[~table["moved"]]["rise"].mean()
    axes.set_title(
        f"{task}: loss changes by {lost:+.2f} nats where supervision is lost, by {kept:+.2f} elsewhere", fontsize=11
    )
    return (
        figure,
        f"Test loss by kind of token and order, {task}; mean change {lost:.2f} nats where framed, {kept:.2f} elsewhere.",
    )


figures.explore(draw_losses, task=["multiplication", "proofs"])


# %%NBQA-CELL-SEP5a09c6
digits_lost = paper.cells(run.result, "multiplication")
digits_lost = digits_lost[digits_lost["moved"]].merge(tables["bayes"], on=["order", "block", "kind"])
figure, axes = plt.subplots(figsize=(5.6, 4.0))
for order, color in (("answer first", ORANGE), ("random", PURPLE), ("reversed", BLUE), ("state after tactic", GREEN)):
    rows = digits_lost[digits_lost["order"] == order]
    if len(rows):
        axes.plot(rows["one_step"], rows["loss"], "o", color=color, ms=6, alpha=0.7, label=names[order])
top = 1.08 * max(digits_lost["one_step"].max(), digits_lost["loss"].max())
axes.plot([0, top], [0, top], color="black", lw=0.8, ls="--")
axes.set(xlim=(0, top), ylim=(0, top), xlabel="Bayes loss without it (nats)", ylabel="test loss (nats)")
axes.legend(frameon=False, fontsize=9)
paid = digits_lost["loss"].sum() / digits_lost["one_step"].sum()
axes.set_title(f"They pay {paid:.0%} of what is missing", fontsize=11)
figures.show(
    figure,
    f"Scatter of test loss against the Bayes loss of digits that lost supervision; together {paid:.0%} of it.",
    "One dot a digit, order and seed. On the dashed line: fitted as if nothing but what stands left could be used.",
)


# %%NBQA-CELL-SEP5a09c6
weak = [claim for claim in run.record.claims if claim.direction != "holds"]
lines = [
    f"- **{claim.direction}**: {claim.statement} ("
    + "; ".join(f"{c.what}: {c.interval}" for c in claim.comparisons if c.verdict != "holds")
    + ")"
    for claim in weak
]
display(Markdown("\n".join(lines) or "Every claim's comparison holds at this scale."))
size_shown = run.params
display(
    Markdown(
        f"Shown here: {size_shown.digits} × {size_shown.by} digits, proofs of {size_shown.tactics} tactics, "
        f"{size_shown.steps} steps of {size_shown.batch_size} samples."
    )
)


# %%NBQA-CELL-SEP5a09c6
rows = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 2], [1, 2], [1, 0]])  # (rows, (y, x)), equally likely


def my_conditional_entropy(rows):
    return None  # your lines: a tensor without dimensions out


def entropy(table):
    shares = torch.unique(table, dim=0, return_counts=True)[1] / len(table)
    return -(shares * shares.log()).sum()


joint, of_y, of_x = entropy(rows), entropy(rows[:, :1]), entropy(rows[:, 1:])
print(
    check(
        my_conditional_entropy,
        (rows,),
        right=joint - of_y,
        wrong={
            "this is the joint entropy; take away that of y.": joint,
            "this is H(x): nothing is known of y in it.": of_x,
            "this is H(y | x), the other way round.": joint - of_x,
            "this is in bits; the natural logarithm gives nats.": (joint - of_y) / np.log(2),
        },
    )
)


# %%NBQA-CELL-SEP5a09c6
run.cost()


# %%NBQA-CELL-SEP5a09c6
run.finish()
