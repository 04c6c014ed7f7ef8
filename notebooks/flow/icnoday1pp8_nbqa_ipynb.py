# %%NBQA-CELL-SEPfcea87
seed = 0  # first seed; runs use seed, seed+1, …
n_seeds = 3  # how many seeds are run; one seed decides no claim
model = "smollm2"  # a causal language model: packaged, tiny:…, folder, Hub id
encoder = "minilm"  # sentence encoder that measures diversity
categories = ["countries", "colours"]  # closed sets to ask for
keys = "raw"  # keys whose clusters decide the claim
n_clusters = 128  # k-means clusters of the vocabulary's keys
main_top = 10  # best tokens whose clusters are the main ones: K
probe_top = 30  # ranks of the initial query that are probed: N
n_candidates = 20  # answers decoded by each way of finding answers
per_round = 10  # new first tokens between two updates of the list
max_tokens = 8  # longest short answer, in tokens
temperatures = [0.7, 1.3]  # tried for sampling
top_ps = [0.9]  # nucleus masses tried for sampling
n_validation = 4  # candidates and problems that tune sampling
n_topics = 1  # topics of open generation per seed
n_texts = 4  # texts generated per topic and method
text_tokens = 12  # longest open text, in tokens
n_problems = 4  # word problems per seed
largest = 9  # largest number in a word problem
ways = 3  # reasoning paths that vote
way_tokens = 30  # longest reasoning path, in tokens
batch_size = 128  # rows decoded at once


# %%NBQA-CELL-SEPfcea87
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display

from midstream import figures, zoo
from midstream.data.closed_sets import closed_sets
from midstream.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from midstream.measure.branching import explorer
from midstream.papers.flow import icn as paper
from midstream.running import open_chapter
from midstream.teaching import check

figures.use_style()
torch.set_num_threads(max(1, min(8, torch.get_num_threads())))
run = open_chapter("icn", globals())
tables, main_top = run.result.tables, int(run.result.scalars["main_top"])
run.banner()


# %%NBQA-CELL-SEPfcea87
counts = {
    verdict: sum(claim.direction == verdict for claim in run.record.claims) for verdict in ("holds", "unclear", "fails")
}
display(
    Markdown(
        f"Of the paper's {len(run.record.claims)} claims checked here, **{counts['holds']} hold**, {counts['unclear']} stay unclear "
        f"and {counts['fails']} fail at this scale; the table is below."
    )
)


# %%NBQA-CELL-SEPfcea87
probe = tables["probe"].copy()
decides = "in_normalised" if run.result.scalars["normalised"] else "in_raw"
probe["bin"] = (probe["rank"] - 1) // 10 * 10 + 5.5
finding = tables["finding"]
last = int(finding["candidates"].max())
names = {"icn": "navigation (ICN)", "ranking": "initial ranking", "sampling": "sampling"}
shades = {"icn": BLUE, "ranking": ORANGE, "sampling": GREY}

figure, (left, right) = plt.subplots(1, 2, figsize=(10.2, 3.9))
later = probe[probe["rank"] > main_top]
for flag, name, color in ((0, "other clusters", GREEN), (1, "main clusters", PURPLE)):
    rows = later[later[decides] == flag]
    seen = rows.groupby("bin")["seed"].nunique()
    figures.mean_band(left, rows[rows["bin"].isin(seen[seen > 1].index)], "bin", "right", name, color)
best = probe[probe["rank"] <= main_top]
left.plot([1, main_top], [best["right"].mean()] * 2, color="black", lw=2)
left.annotate(f"top {main_top}", (1, best["right"].mean()), xytext=(0, 6), textcoords="offset points", fontsize=10)
left.set(xlabel="rank of the first token", ylabel="share of right answers", xlim=(0, probe["rank"].max() * 1.45))
left.set_ylim(0, None)
gap = paper.over(probe, paper.matched_gap(decides, main_top), "seed")
left.set_title(f"Outside − inside, matched rank: {gap.estimate:+.3f}")
for method, name in names.items():
    rows = finding[finding["method"] == method]
    figures.mean_band(right, rows, "candidates", "correct", name, shades[method])
right.set(xlabel="decoded candidates", ylabel="different right answers", xlim=(0, last * 1.6), ylim=(0, None))
ends = finding[finding["candidates"] == last].groupby("method")["correct"].mean()
right.set_title(f"{ends['icn']:.1f} right answers by ICN, {ends['ranking']:.1f} by ranking")
figures.show(
    figure,
    f"Left: share of right answers by rank of the first token, {best['right'].mean():.2f} in the top {main_top}; behind it one curve "
    f"for tokens inside and one for tokens outside the top's clusters, whose difference at matched rank is {gap}. Right: different right answers "
    f"against decoded candidates; at {last} candidates " + ", ".join(f"{names[m]} {ends[m]:.1f}" for m in names) + ".",
    "Means over closed sets; bands: 95 % intervals over seeds, each of which words the question anew.",
)


# %%NBQA-CELL-SEPfcea87
run.claims()


# %%NBQA-CELL-SEPfcea87
figures.source(paper.query_and_keys, paper.in_main_clusters)


# %%NBQA-CELL-SEPfcea87
figures.source(paper.navigate)


# %%NBQA-CELL-SEPfcea87
loaded = zoo.load(run.params.model)
loaded.model.requires_grad_(False)
presidents = closed_sets()["presidents"]
start = explorer(loaded, paper.question(presidents.plural, seed=7), paper.QUOTED)
query, keys = paper.query_and_keys(loaded.model, torch.tensor(start.ids))
logits = keys @ query  # (vocabulary,)

ranks = logits.argsort(descending=True).argsort() + 1
unit = torch.nn.functional.normalize(keys, dim=-1)
rows = []
for token in paper.Listing(start).best(4):
    near = (unit @ unit[token]).topk(7).indices.tolist()[1:]
    rows.append(
        {
            "token": repr(loaded.tokenizer.decode([token])),
            "its rank": int(ranks[token]),
            "nearest keys, with their ranks": ", ".join(
                f"{loaded.tokenizer.decode([t])!r} {int(ranks[t])}" for t in near
            ),
        }
    )
print(start.text)
display(pd.DataFrame(rows).style.hide(axis="index"))


# %%NBQA-CELL-SEPfcea87
limits = paper.Decoding(max_tokens=7, batch_size=16)
found = paper.rank([start], 10, limits)[0]
before = start.logits.log_softmax(-1)


def draw_listing(listed):
    listing = paper.Listing(start)
    listing.add(found[:listed])
    after = listing.logits.log_softmax(-1)
    figure, axes = plt.subplots(figsize=(7.4, 3.7))
    for row, answer in enumerate(found):
        color = BLUE if row < listed else GREY
        axes.plot([before[answer.token], after[answer.token]], [row, row], color=color, lw=2)
        axes.plot(before[answer.token], row, "o", color="white", mec=color, ms=6)
        axes.plot(after[answer.token], row, "o", color=color, ms=6)
    words = [("✓ " if paper.is_right(a, presidents) else "") + a.text[:26] for a in found]
    axes.set_yticks(range(len(found)), words)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set(xlabel="log-probability of the answer's first token")
    moved = [float(after[a.token] - before[a.token]) for a in found]
    mine = f"{np.mean(moved[:listed]):+.1f}" if listed else "none"
    rest = f"{np.mean(moved[listed:]):+.1f}" if listed < len(found) else "none"
    axes.set_title(f"{listed} listed: change {mine}; not listed: {rest}")
    fresh = listing.best(3)
    text = ", ".join(repr(loaded.tokenizer.decode([t])) for t in fresh)
    return figure, (
        f"Log-probabilities of ten first tokens before (open dots) and after (filled) listing {listed} answers. Mean change "
        f"of listed ones {mine}, of others {rest}. New first tokens on top: {text}."
    )


figures.explore(draw_listing, listed=[0, 2, 4, 6, 8])


# %%NBQA-CELL-SEPfcea87
push = tables["push"]
groups = {
    "listed": "listed",
    "unlisted": "not listed, same ranks",
    "neighbours": "later ranks, listed tokens' clusters",
    "others": "later ranks, other clusters",
}
figure, panels = plt.subplots(1, 2, figsize=(10.4, 2.7), sharex=True, sharey=True)
for axes, source, name in zip(panels, ("own", "foreign"), ("Own", "Foreign"), strict=True):
    rows = push[push["list"] == source]
    figures.bars(axes, rows, "change", "group", groups, {"listed": BLUE})
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel="change of centred logit")
    axes.set_title(f"{name} answers listed: listed − not {-paper.over(rows, paper.push_gap, 'seed').estimate:+.2f}")
means = push.groupby(["list", "group"])["change"].mean()
words = "; ".join(f"{s} list, {groups[g]}: {value:+.2f}" for (s, g), value in means.items())
figures.show(
    figure,
    f"Bars of the change of centred logits in four groups of tokens, with the prompt's own and with foreign answers listed. {words}.",
    "Dots: seeds; thick lines: 95 % intervals over seeds.",
)


# %%NBQA-CELL-SEPfcea87
figures.source(paper.matched_gap)


# %%NBQA-CELL-SEPfcea87
kinds = {"in_raw": "raw keys", "in_normalised": "keys of length one", "in_shuffled": "shuffled clusters"}
rows = []
for column in kinds:
    for seed, own in probe.groupby("seed"):
        inside = own[own["rank"] > main_top].groupby(column)["right"].mean()
        rows.append(
            {
                "seed": seed,
                "clusters": column,
                "matched": paper.matched_gap(column, main_top)(own),
                "plain": inside.get(0, np.nan) - inside.get(1, np.nan),
            }
        )
gaps = pd.DataFrame(rows).dropna()
figure, panels = plt.subplots(1, 2, figsize=(10.2, 2.3), sharex=True, sharey=True)
for axes, column, name in zip(panels, ("plain", "matched"), ("all middle ranks", "at matched rank"), strict=True):
    figures.bars(axes, gaps, column, "clusters", kinds, {decides: BLUE})
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel=f"outside − inside, {name}")
share = probe[probe["rank"] > main_top].groupby("seed")[decides].mean().mean()
panels[0].set_title(f"{share:.0%} of middle ranks lie inside")
values = gaps.groupby("clusters")["matched"].mean()
panels[1].set_title(
    f"raw keys {values.get('in_raw', np.nan):+.3f}, length one {values.get('in_normalised', np.nan):+.3f}"
)
figures.show(
    figure,
    "Bars of accuracy outside minus inside the main clusters, for clusters of raw keys, of normalised keys and shuffled ones. At matched rank: "
    + ", ".join(f"{kinds[k]} {v:+.3f}" for k, v in values.items())
    + ".",
    "Dots: seeds; thick lines: 95 % intervals over seeds. Whether the paper normalises keys is not known to us.",
)
sets = {
    name: paper.over(own, paper.matched_gap(decides, main_top), "seed").estimate
    for name, own in probe.groupby("category")
}
display(Markdown("By set, at matched rank: " + ", ".join(f"{name} {value:+.2f}" for name, value in sets.items()) + "."))


# %%NBQA-CELL-SEPfcea87
precision = finding[finding["candidates"] == last]
sets = sorted(precision["category"].unique())
figure, axes = plt.subplots(figsize=(8.6, 0.62 * len(sets) + 1.1))
for row, category in enumerate(sets):
    for shift, method in ((-0.22, "icn"), (0, "ranking"), (0.22, "sampling")):
        values = precision[(precision["category"] == category) & (precision["method"] == method)]["mean_precision"]
        axes.plot(values, np.full(len(values), row + shift), "o", color=shades[method], ms=4, alpha=0.6)
        axes.plot(
            [values.mean()] * 2,
            [row + shift - 0.1, row + shift + 0.1],
            color=shades[method],
            lw=3,
            label=names[method] if not row else None,
        )
axes.set_yticks(range(len(sets)), [closed_sets()[name].plural for name in sets])
axes.set(xlabel="mean precision@1…k", ylim=(len(sets) - 0.5, -0.5), xlim=(0, None))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
means = precision.groupby("method")["mean_precision"].mean()
wide = precision.groupby(["category", "method"])["mean_precision"].mean().unstack()
ahead = int((wide["icn"] > wide["ranking"]).sum())
axes.set_title(f"ICN is ahead of the ranking on {ahead} of {len(sets)} sets")
figures.show(
    figure,
    "Mean precision by closed set and method. Means: "
    + ", ".join(f"{names[m]} {means[m]:.3f}" for m in names)
    + f". ICN leads the ranking on {ahead} of {len(sets)} sets.",
    "Dots: seeds, bars: their means.",
)
tuned = tables["tuning"].loc[tables["tuning"].groupby("purpose")["score"].idxmax()]
display(
    Markdown(
        "Sampling, as tuned: "
        + "; ".join(f"{r.purpose}: temperature {r.temperature:g}, top-p {r.top_p:g}" for r in tuned.itertuples())
        + "."
    )
)


# %%NBQA-CELL-SEPfcea87
diversity, votes = tables["diversity"], tables["votes"]
figure, panels = plt.subplots(1, 3, figsize=(11.6, 2.5), width_ratios=(1, 1, 1))
figures.bars(panels[0], diversity, "distance", "method", names, shades)
figures.bars(panels[1], diversity, "log_probability", "method", dict.fromkeys(names, ""), shades)
ways = {"icn": "ICN", "ranking": "ranking", "sampling": "sampling", "greedy": "one path"}
figures.bars(panels[2], votes, "accuracy", "method", ways, shades | {"greedy": GREEN})
panels[0].set(xlabel="distance of sentences", xlim=(0, 1))
panels[1].set(xlabel="mean log-probability of a token")
panels[2].set(xlabel="accuracy of the vote", xlim=(0, 1))
far, right_votes = diversity.groupby("method")["distance"].mean(), votes.groupby("method")["accuracy"].mean()
panels[0].set_title(f"{far['icn']:.2f}, samples {far['sampling']:.2f}")
panels[1].set_title("How likely they are")
panels[2].set_title(f"{right_votes['icn']:.0%}, one path {right_votes['greedy']:.0%}")
any_path = votes.groupby("method")["any"].mean()
likely = diversity.groupby("method")["log_probability"].mean()
figures.show(
    figure,
    "Three panels of bars. Sentence distance: "
    + ", ".join(f"{names[m]} {far[m]:.2f}" for m in names)
    + ". Mean log-probability: "
    + ", ".join(f"{names[m]} {likely[m]:.2f}" for m in names)
    + ". Vote accuracy: "
    + ", ".join(f"{ways[m]} {right_votes[m]:.2f}" for m in ways)
    + ".",
    "Dots: seeds; thick lines: 95 % intervals over seeds.",
)
display(
    Markdown(
        f"At least one of {run.params.ways} paths is right in {any_path['icn']:.0%} of the problems with ICN, {any_path['ranking']:.0%} with the "
        f"ranking and {any_path['sampling']:.0%} with samples; a single path of ICN's is right in {votes[votes['method'] == 'icn']['single'].mean():.0%}."
    )
)


# %%NBQA-CELL-SEPfcea87
weak = [claim for claim in run.record.claims if claim.direction != "holds"]
lines = [
    f"- **{claim.direction}**: {claim.statement} ("
    + "; ".join(f"{c.what}: {c.interval}" for c in claim.comparisons if c.verdict != "holds")
    + ")"
    for claim in weak
]
display(Markdown("\n".join(lines) or "Every claim's comparison holds at this scale."))


# %%NBQA-CELL-SEPfcea87
generator = torch.Generator().manual_seed(1)
logits_before = torch.randn(40, generator=generator)
logits_after = torch.randn(40, generator=generator) + 3
listed_tokens = torch.tensor([3, 7, 12])


def my_push(logits_before, logits_after, listed_tokens):
    return None  # your line: (vocabulary,) twice and (n,) in, one number out


moved = logits_after - logits_before
print(
    check(
        my_push,
        (logits_before, logits_after, listed_tokens),
        right=(moved - moved.mean())[listed_tokens].mean(),
        wrong={
            "centre over the vocabulary first: a shift of all logits changes no probability.": moved[
                listed_tokens
            ].mean(),
            "this is centred over the listed tokens; their mean is zero by construction.": torch.tensor(0.0),
            "the sign: a fall is negative.": -(moved - moved.mean())[listed_tokens].mean(),
        },
    )
)


# %%NBQA-CELL-SEPfcea87
run.cost()


# %%NBQA-CELL-SEPfcea87
run.finish()
