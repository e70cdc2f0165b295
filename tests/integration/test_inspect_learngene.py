"""scripts/inspect_learngene.py: what it prints is counted again here, from published files and from the ViTs."""

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import models
from models.learngene import to_published
from models.meta import WeightsOnMeta
from models.vit import timm_kwargs

import pytest
import timm
import torch
from conftest import ENVIRONMENT, SECONDS, TESTS
from PIL import Image

SCRIPT = TESTS.parent / "scripts" / "inspect_learngene.py"
FIXTURES = {method: TESTS / "fixtures" / f"{method}_learngene.pth" for method in ("lets", "tleg")}
METHODS = tuple(FIXTURES)

# label of a part → the keys of a published file that belong to it
PUBLISHED_KEYS = {
    "lets": {
        "layers of the learngene": r"__sm_\d+_.*",
        "patch embedding of the learngene": r"__sm_patch_embed_.*",
        "final norm of the learngene": r"__sm_fc_norm_.*",
        "head of the learngene": r"__sm_head_.*",
        "E, width of the embedding": r"patch_embed\.trans_width_emb\.trans_weight",
        "C, width of the head's input": r"trans_width_cls\.trans_weight",
        "Q, width of the queries": r".*trans_width_q\.trans_weight",
        "K, width of the keys": r".*trans_width_k\.trans_weight",
        "V, width of the values": r".*trans_width_v\.trans_weight",
        "M, width of the hidden layers": r".*trans_width_ffn\.trans_weight",
        "g, depth coefficients of weights": r".*trans_depth_weight\.trans_weight",
        "h, depth coefficients of biases": r".*trans_depth_weight\.trans_bias",
        "position embedding of the Aux-Net": "pos_embed",
    },
    "tleg": {
        "A, slope of the layers": r".*_ilayer",
        "B, layer at position 0": r".*_base",
        "patch embedding": r"patch_embed\..*",
        "position embedding": "pos_embed",
        "final norm": r"norm\..*",
        "head": r"head\..*",
    },
}


def own_file(path: Path, aux_net: torch.nn.Module, **options: object) -> Path:
    models.Learngene.of(aux_net, options).save(path)
    return path


def small(method: str) -> torch.nn.Module:
    if method == "tleg":
        return models.create_model("aux_deit_nano_patch8_16_L6_H3", num_classes=10)
    return models.create_aux_net("deit_nano_patch8_16_L4_H2", "deit_nano_patch8_16_L8_H3", num_classes=10)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script with the given arguments in this process: exit status, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return (end.value.code, *capsys.readouterr())

    return run


def inspect(run, *args: object) -> dict[str, list[str]]:
    """The lines of each section of what the script prints; the one before the first title has the name ''."""
    status, stdout, stderr = run(*args)
    assert (status, stderr) == (0, "")
    first, *sections = stdout.rstrip("\n").split("\n\n")
    sections = {title: lines for title, *lines in map(str.splitlines, sections)}
    assert list(sections) == ["Sizes", "Parameters", "Des-Nets", "Options of stage 1"]
    return {"": [first], **sections}


def parts_of(lines: list[str]) -> dict[str, int]:
    """Label → number of parameters, without the total, which is the sum of them; the shares are right."""
    cells = [re.fullmatch(r"  (.*?) +([\d,]+) +(<?)([\d.]+)%", line) for line in lines[:-1]]
    parts = {cell[1]: int(cell[2].replace(",", "")) for cell in cells}
    total = parts["total"]
    for cell, part in zip(cells, parts.values(), strict=True):
        share = 100 * part / total
        assert share < 0.1 if cell[3] else share == pytest.approx(float(cell[4]), abs=0.051)
    assert sum(parts.values()) == 2 * parts.pop("total")
    return parts


def des_nets_of(lines: list[str]) -> dict[tuple[int, int], dict[int, int]]:
    """(heads, width) → depth → number of parameters."""
    titles, *rows = [line.split() for line in lines[1:] if re.match(r" +(heads|\d+) +(width|\d+) ", line)]
    depths = [int(title[1:]) for title in titles if re.fullmatch(r"L\d+", title)]
    return {
        (int(heads), int(width)): {
            depth: int(count.replace(",", "")) for depth, count in zip(depths, counts, strict=False)
        }
        for heads, width, *counts in rows
    }


def parameters_of(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_parameters_by_part_are_those_of_the_published_file(run, method):
    found = inspect(run, FIXTURES[method], "--head-dim", 4)
    published = torch.load(FIXTURES[method], weights_only=False)["model"]
    assert parts_of(found["Parameters"]) == {
        label: sum(tensor.numel() for key, tensor in published.items() if re.fullmatch(keys, key))
        for label, keys in PUBLISHED_KEYS[method].items()
    }
    assert sum(parts_of(found["Parameters"]).values()) == sum(tensor.numel() for tensor in published.values())
    arch = models.load_learngene(FIXTURES[method], head_dim=4).arch
    plain = timm.create_model("vit_base_patch16_224", num_classes=10, **timm_kwargs(arch))
    assert f" {parameters_of(plain):,} parameters" in found["Parameters"][-1]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_first_line_says_what_the_file_is(run, method, averaged):
    found = inspect(run, FIXTURES[method], "--head-dim", 4, *["--gene-ema"] * averaged)
    assert found[""] == [str(models.load_learngene(FIXTURES[method], head_dim=4, use_ema=averaged))]


def test_sizes(run):
    lets = inspect(run, FIXTURES["lets"], "--head-dim", 4)["Sizes"]
    assert [line.split() for line in lets[1:3]] == [
        ["learngene", "8", "8", "2", "4", "16", "px", "32", "px"],
        ["Aux-Net", "16", "16", "4", "4", "16", "px", "32", "px"],
    ]
    assert lets[3:] == ["  10 classes, 3 input channels", "  Aux layers per row of depth coefficients: 2 (8 rows)"]
    tleg = inspect(run, FIXTURES["tleg"], "--head-dim", 4)["Sizes"]
    assert [line.split() for line in tleg[1:]] == [
        ["Aux-Net", "12", "12", "3", "4", "16", "px", "32", "px"],
        ["10", "classes,", "3", "input", "channels"],
    ]


@pytest.mark.parametrize(
    ("create", "names", "expected", "des_net"),
    [
        # the learngene's own ViT, and the largest Des-Net in the table
        (models.create_aux_net, ("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12"), 37_735_784, {
            (6, 384, 8): 14_952_040, (12, 768, 16): 114_917_608,
        }),
        (models.create_model, ("aux_deit_base_patch16_224",), 15_687_400, {(12, 768, 12): 86_566_120}),
    ],
    ids=METHODS,
)  # fmt: skip
def test_published_sizes(run, tmp_path, create, names, expected, des_net):
    with WeightsOnMeta():
        aux_net = create(*names)
    gene = models.Learngene.of(aux_net)
    gene.tensors = {name: torch.zeros(tensor.shape) for name, tensor in gene.tensors.items()}
    gene.save(tmp_path / "learngene.safetensors")
    found = inspect(run, tmp_path / "learngene.safetensors")
    assert sum(parts_of(found["Parameters"]).values()) == expected
    table = des_nets_of(found["Des-Nets"])
    assert {key: table[key[:2]][key[2]] for key in des_net} == des_net


@pytest.mark.parametrize("method", METHODS)
def test_des_nets_are_those_that_the_learngene_makes(run, method):
    found = inspect(run, FIXTURES[method], "--head-dim", 4)["Des-Nets"]
    gene = models.load_learngene(FIXTURES[method], head_dim=4)
    table, refused = des_nets_of(found), []
    for heads in range(1, gene.arch.num_heads + 2):
        for depth in (1, *table.get((heads, 4 * heads), {})):
            arch = models.ViTArch(4 * heads, depth, heads, gene.arch.patch_size, gene.arch.img_size)
            try:
                count = parameters_of(gene.descend(arch))
            except models.InputError as error:
                refused.append(f"  not with {heads} heads: {error}")
                continue
            assert table[heads, arch.width].get(depth, count) == count
    assert len(table) + len(refused) == gene.arch.num_heads + 1
    assert found[-1] == refused[-1]
    assert all(len(counts) == 4 for counts in table.values())


def test_widths_of_lets_come_from_the_learngene_or_from_the_width_matrices(run):
    found = inspect(run, FIXTURES["lets"], "--head-dim", 4)["Des-Nets"]
    sources = [re.split(r"  +", line)[-1] for line in found[3:7]]
    assert sources == ["first 1 of 2", "all 2", "all 2 + 1 new", "all 2 + 2 new"]
    assert "models.ViTArch(width=4, depth=4, num_heads=1, patch_size=16, img_size=32)" in found[7]


@pytest.mark.parametrize("method", METHODS)
def test_names_stand_for_the_des_nets_of_the_table(run, tmp_path, method):
    path = own_file(tmp_path / "learngene.safetensors", small(method))
    found = inspect(run, path)["Des-Nets"]
    names = [match[1] for line in found if (match := re.search(r"the (?:smallest|largest) of these: (\S+)$", line))]
    table = des_nets_of(found)
    counts = [count for row in table.values() for count in row.values()]
    gene = models.load_learngene(path)
    assert [parameters_of(gene.descend(name)) for name in names] == [min(counts), max(counts)]


def test_an_elastic_learngene(run, tmp_path):
    aux_net = models.create_aux_net("deit_nano_patch8_16_L4_H2", num_classes=10)
    aux_net.keep_layers([2, 0, 3, 1])
    found = inspect(run, own_file(tmp_path / "learngene.safetensors", aux_net))
    assert "layers of the source that a Des-Net keeps: 2; 0, 2; 0, 2, 3; 0, 1, 2, 3" in found["Sizes"][-1]
    assert sum(parts_of(found["Parameters"]).values()) == parameters_of(aux_net)
    assert found["Des-Nets"][0].startswith("  of up to 4 layers, with heads of 32 neurons, up to 256 hidden neurons")
    assert (
        found["Des-Nets"][-1]
        == "  not with 3 heads: the Des-Net has 3 heads, the source 2: an elastic learngene makes parts of its source"
    )


def test_recorded_options(run, tmp_path):
    path = own_file(tmp_path / "learngene.safetensors", small("tleg"), opt="adamw", epochs=3, title="\x1b[31mred\nline")
    options = inspect(run, path)["Options of stage 1"]
    assert options == ["  epochs: 3", "  opt: adamw", "  'title: \\x1b[31mred\\nline'"]
    bare = own_file(tmp_path / "bare.safetensors", small("tleg"))
    assert inspect(run, bare)["Options of stage 1"] == ["  nothing"]


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def check_picture(path: Path, picture_format: str) -> None:
    with Image.open(path) as picture:
        assert picture.format == picture_format
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.full
def test_picture_of_a_published_learngene_in_a_process_of_its_own(tmp_path):
    picture = tmp_path / "learngene.png"
    command = [sys.executable, SCRIPT, FIXTURES["lets"], "--head-dim", "4", "--plot", picture]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nParameters\n" in done.stdout
    check_picture(picture, "PNG")


def arch(width: int, depth: int) -> models.ViTArch:
    return models.ViTArch(width, depth, width // 4, patch_size=8, img_size=16)


UNTRAINED = {
    "zeros": lambda: small("tleg"),  # A of the norms, and all biases
    "no width matrices": lambda: models.create_aux_net(arch(8, 4), arch(8, 8)),
    "many rows": lambda: models.create_aux_net(arch(8, 4), arch(12, 26), layers_per_row=1),
}


@pytest.mark.parametrize("case", UNTRAINED)
def test_picture_of_what_leaves_something_out(run, tmp_path, case):
    path = own_file(tmp_path / "learngene.safetensors", UNTRAINED[case]())
    (tmp_path / "picture").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inspect(run, path, "--plot", tmp_path / "picture" / "learngene.JPG")
    # of a division by zero, and of a picture without room for its parts
    assert [w.message for w in caught if w.category in (RuntimeWarning, UserWarning)] == []
    check_picture(tmp_path / "picture" / "learngene.JPG", "JPEG")


# ---------------------------------------------------------------------------------------------------------------------
# What the user got wrong
# ---------------------------------------------------------------------------------------------------------------------

FIXTURE = f"{FIXTURES['lets']} --head-dim 4"
WRONG = {
    "missing": ("no.pth", ("no.pth", "missing")),
    "no_weights": (f"{SCRIPT}", (SCRIPT.name, "no file of weights")),
    "no_learngene": ("vit.pth", ("vit.pth", "not a learngene", "LeTs", "TLEG")),
    "head_dim": (f"{FIXTURES['lets']}", ("lets_learngene.pth", "width 8", "64", "head")),
    "head_dim_0": (f"{FIXTURES['lets']} --head-dim 0", ("--head-dim", "0", "at least 1")),
    "averaged": ("bare.pth --gene-ema", ("bare.pth", "model_ema")),
    "suffix": (f"{FIXTURE} --plot x.txt", ("--plot", "x.txt", ".png")),
    "no_suffix": (f"{FIXTURE} --plot png", ("--plot", ".png")),
    "suffix_of_missing": ("no.pth --plot x.txt", ("--plot", "x.txt")),
    "folder": (f"{FIXTURE} --plot no/x.png", ("--plot", "no/x.png", "directory")),
    "directory": (f"{FIXTURE} --plot folder.png", ("--plot", "folder.png", "is a directory")),
}


@pytest.mark.parametrize("case", WRONG)
def test_user_errors_print_one_line(run, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    torch.save(models.create_model("deit_nano_patch8_16_L1").state_dict(), "vit.pth")
    torch.save(to_published(models.load_learngene(FIXTURES["lets"], head_dim=4)), "bare.pth")
    Path("folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    args, expected = WRONG[case]
    status, stdout, stderr = run(*args.split())
    assert (status, stdout) == (2, "")
    assert re.fullmatch(r"error: .+\n", stderr)
    assert all(part in stderr for part in expected)
    assert sorted(tmp_path.iterdir()) == before
