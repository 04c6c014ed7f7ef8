# Runs the cells of a sweep, each a `midstream run` with a folder of its own. Called by `midstream sweep`, which checks
# the grid, writes the plan, and afterwards makes the table and the figure. Profiles say where cells run.
import json
from pathlib import Path

PLAN = json.loads(Path(config["plan"]).read_text())


rule all:
    input:
        expand("cells/{cell}/record.json", cell=PLAN["cells"]),


rule cell:
    output:
        "cells/{cell}/record.json",
    log:
        "logs/{cell}.txt",
    params:
        python=PLAN["python"],
        arguments=lambda wildcards: PLAN["cells"][wildcards.cell],
        folder=lambda wildcards: f"cells/{wildcards.cell}",
    threads: PLAN["threads"]  # Snakemake sets OMP_NUM_THREADS and its like to this
    resources:
        gpu=PLAN["gpus"],
        mem_mb=PLAN["memory_mb"],
        runtime=PLAN["minutes"],
    shell:
        "{params.python:q} -m midstream.slots {resources.gpu} "
        "{params.python:q} -m midstream.cli run {params.arguments:q} --out {params.folder:q} > {log:q} 2>&1"
