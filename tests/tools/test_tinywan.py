"""Every phase of TinyWan's training, on a very small model and very small clips."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.tinywan.denoiser import (
    Denoiser,
    foreground,
    lesson_loss,
    plain_attention,
    plain_sparse_branch,
    train_denoiser,
)
from tools.tinywan.latents import (
    Pool,
    centre,
    encode,
    fill_pool,
    middle,
    nearest_window,
    pixels_of,
    window,
)
from tools.tinywan.lessons import Lessons, state_times, steps_of
from tools.tinywan.networks import Network, make_tokenizer, token_ids
from tools.tinywan.pictures import HEIGHT, MARGIN, curves
from tools.tinywan.preview import SIZES as PREVIEW_SIZES
from tools.tinywan.preview import likeness, new_preview, train_preview
from tools.tinywan.publish import publish
from tools.tinywan.scenes import SIZES, Scene, caption, draw_scene, render, vocabulary
from tools.tinywan.training import Plan, load_averaged, train
from tools.tinywan.vae import latent_crops, new_vae, settle_latents, train_decoder, train_vae
from tools.tinywan.words import Reader, answers, train_words
from wanforge.configs.model import DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig, VideoConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.plugins.dense_attention.reference import dense_attention
from wanforge.plugins.sparse_linear_attention.reference import Blocks, block_scores, select_blocks, sparse_branch
from wanforge.runtime.measure.quality.figures import COLOURS
from wanforge.runtime.measure.quality.held_out import held_out_prompts
from wanforge.runtime.reference.vae import VAE

pytestmark = pytest.mark.slow

TINYWAN = load_model("tinywan")
MODEL = ModelConfig(
    name="smallest",
    task="t2v",
    checkpoint="smallest",
    topk=0.5,
    dit=DiTConfig(dim=128, ffn_dim=128, num_layers=1, text_dim=16, text_rows=40),
    vae=VAEConfig(dim=4),
    text_encoder=TextEncoderConfig(vocab_size=128, dim=16, ffn_dim=16, num_heads=2, num_layers=1),
    video=VideoConfig(width_px=80, height_px=80, frames=13),
)
FRAME, FRAMES = (MODEL.video.width_px, MODEL.video.height_px), MODEL.video.frames
SHAPE = (16, 4, 10, 10)
"""The shape of the latents of the model's clips."""
SHORT = Plan(steps=4, batch=2, rate=1e-3, warmup=1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def scene_of(seed: int) -> Scene:
    return draw_scene(np.random.default_rng(seed), FRAME, FRAMES)


@pytest.fixture(scope="module")
def vae() -> VAE:
    return new_vae(MODEL)


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_what_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def run(folder: Path, *stops: int) -> dict[str, Tensor]:
        for stop in stops:
            network = train_vae(MODEL, new_vae(MODEL), "vae", folder, replace(SHORT, stop_at=stop), crop=(5, 16))
        return network.state_dict()

    whole, pieces = run(tmp_path / "whole", 4), run(tmp_path / "pieces", 1, 3, 4)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert not all(torch.equal(whole[name], value) for name, value in new_vae(MODEL).state_dict().items())


def test_training_lowers_the_loss_and_muon_takes_the_matrices(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    before = [p.detach().clone() for p in layer.parameters()]
    x = torch.randn(64, 8)
    target = torch.sin(x[:, :4] * 2)
    plan = Plan(steps=60, batch=64, rate=2e-2, warmup=5, muon=True)
    train("layer", tmp_path, plan, layer, lambda rng, generator: ((layer(x) - target).square().mean(), {}))
    found = losses(tmp_path / "layer.jsonl")
    assert found[-1] < 0.75 * found[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_the_vae_begins_as_one_of_pictures_and_learns(tmp_path: Path) -> None:
    vae = new_vae(MODEL)
    still = pixels_of(MODEL, scene_of(0))[:, :, :1].expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        latents = vae.encode(still)
    # So far, only the small noise of the temporal resamplers tells one time from another.
    assert float((latents[:, :, 2:] - latents[:, :, 1:-1]).std()) < 0.05 * float(latents.std())
    train_vae(MODEL, vae, "vae", tmp_path, Plan(steps=24, batch=2, rate=5e-3, warmup=2), crop=(1, 16))
    first, last = losses(tmp_path / "vae.jsonl")
    assert last < first


def test_settled_latents_have_unit_deviation_and_decode_to_the_same(vae: VAE) -> None:
    settled = new_vae(MODEL)
    settle_latents(settled, MODEL, samples=6, seed=5)
    clips = [pixels_of(MODEL, scene_of(i)) for i in range(3)]
    with torch.no_grad():
        latents = torch.cat([settled.encode(clip).flatten() for clip in clips])
        assert 0.7 < float(latents.std()) < 1.4
        before, after = vae.decode(vae.encode(clips[0])), settled.decode(settled.encode(clips[0]))
    assert torch.allclose(before, after, atol=1e-3)


def test_the_decoder_alone_moves(tmp_path: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.tinywan.latents.SHARD", 2)
    list(fill_pool(MODEL, vae, tmp_path, range(1)))
    trained = new_vae(MODEL)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    plan = Plan(steps=2, batch=1, rate=1e-3, warmup=1)
    train_decoder(MODEL, trained, Pool(tmp_path, range(1)), tmp_path, plan)
    moved = {name.split(".")[0] for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "conv2"}


def test_the_preview_decoder_learns_two_scenes(tmp_path: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.tinywan.latents.SHARD", 2)
    list(fill_pool(MODEL, vae, tmp_path, range(1)))
    plan = Plan(steps=60, batch=2, rate=3e-3, warmup=5, decay=0.5)
    train_preview(MODEL, new_preview(), Pool(tmp_path, range(1)), tmp_path, plan, side=32)
    first, *_, last = losses(tmp_path / "preview.jsonl")
    assert last < 0.8 * first
    found = likeness(MODEL, vae, load_averaged("preview", tmp_path, new_preview()), count=1)
    assert [clip.shape for clip in found.clips] == [found.clips[0].shape] * 3
    assert found.preview_to_drawn > 3


@pytest.mark.parametrize("side", [48, None])
def test_latents_and_pixels_are_cut_at_the_same_place(vae: VAE, side: int | None) -> None:
    """The latents of these scenes are every eighth of their own pixels, so both cuts must show the same values."""
    pool = Pool(Path("nowhere"), range(0))
    pool.scenes = [scene_of(3), scene_of(4)]
    pool.latents = [pixels_of(MODEL, scene)[0, :1, ::4, ::8, ::8].expand(16, -1, -1, -1) for scene in pool.scenes]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        latents, pixels, weight = latent_crops(rng, MODEL, pool, np.array([0, 1]), 3, side)
        assert pixels.shape[2] == 9
        assert torch.allclose(latents[:, :1], pixels[:, :1, ::4, ::8, ::8])
        assert set(weight.unique().tolist()) == {1.0, 4.0}


def test_the_pool_is_the_same_whoever_fills_it(tmp_path: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.tinywan.latents.SHARD", 2)
    assert len(list(fill_pool(MODEL, vae, tmp_path / "a", range(1)))) == 1
    growing = Pool(tmp_path / "a", range(2))
    assert len(growing.scenes) == 2
    assert len(list(fill_pool(MODEL, vae, tmp_path / "a", range(2)))) == 1
    growing.refresh()
    assert len(list(fill_pool(MODEL, vae, tmp_path / "b", range(1, 2)))) == 1
    whole, part = Pool(tmp_path / "a", range(2)), Pool(tmp_path / "b", range(1, 2))
    assert whole.scenes[2:] == part.scenes
    assert all(map(torch.equal, whole.latents[2:], part.latents))
    assert torch.equal(encode(MODEL, vae, whole.scenes[3]).half(), whole.latents[3])
    assert growing.scenes == whole.scenes
    assert all(map(torch.equal, growing.latents, whole.latents))


def test_captions_say_what_is_shown_in_known_words() -> None:
    tokens, rng = make_tokenizer(), np.random.default_rng(0)
    unknown = tokens.token_to_id("<unk>")
    for _ in range(200):
        scene = draw_scene(rng, (128, 112), 21)
        text = caption(rng, scene)
        for thing in scene.things:
            assert thing.subject.colour in text.lower()
            assert thing.subject.shape in text.lower()
        assert "  " not in text
        ids = token_ids(tokens, text)
        assert unknown not in ids
        assert len(ids) <= len(text.replace(",", " ,").replace(".", " .").split()) + 1
    for prompt in held_out_prompts():
        assert {tokens.id_to_token(i) for i in token_ids(tokens, prompt.text)} <= {
            *(f"\u2581{word}" for word in vocabulary()),
            *(".", "</s>"),
        }
    assert tokens.get_vocab_size() <= TINYWAN.text_encoder.vocab_size


def test_prompts_are_embedded_alike_alone_and_together() -> None:
    network, tokens = Network(MODEL, load_recipe("bf16")), make_tokenizer()
    prompts = [token_ids(tokens, text) for text in ("a red circle", "a small blue ring moving up", "a red circle.")]
    together = network.embed([prompts[0], [], *prompts[1:]])
    assert together.shape == (4, 40, 16)
    assert not together[1].any()
    for place, ids in zip((0, 2, 3), prompts, strict=True):
        assert torch.allclose(together[place], network.embed([ids])[0], atol=1e-6)


def test_plain_attention_is_dense_attention() -> None:
    q, k, v = torch.randn(2, 5, 2, 128), torch.randn(2, 7, 2, 128), torch.randn(2, 7, 2, 128)
    bias = torch.randn(7)
    assert torch.allclose(plain_attention(q, k, v), dense_attention(q, k, v), atol=1e-5)
    assert torch.allclose(plain_attention(q, k, v, bias), dense_attention(q, k, v, bias), atol=1e-5)


@pytest.mark.parametrize("tokens", [256, 300])
def test_plain_sparse_branch_is_the_reference_under_a_mask(tokens: int) -> None:
    q, k, v = (torch.randn(2, 2, tokens, 128, requires_grad=True) for _ in range(3))
    blocks = Blocks()
    selected = select_blocks(block_scores(q, k, blocks), 3)
    weight = torch.randn(2, 2, tokens, 128)
    results = []
    for branch in (sparse_branch, plain_sparse_branch):
        out = branch(q, k, k, v, selected, blocks)
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_every_window_of_a_scene_shows_its_things_whole(seed: int) -> None:
    scene = draw_scene(np.random.default_rng(seed), (128, 112), 21)
    (width, height), background = scene.size_wh, render(scene, 21)[0, 0, 0]
    assert width % 8 == height % 8 == 0
    shown = (render(scene, 21) != background).any((0, 3))
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    # Things lie within both the first window and the last, so within every window between them.
    assert rows[0] >= height - 112
    assert rows[-1] < 112
    assert columns[0] >= width - 128
    assert columns[-1] < 128
    assert max(width - 128, height - 112) > 0
    assert columns[-1] - columns[0] >= 2 * min(SIZES.values()) - 2


def test_what_a_caption_does_not_say_is_ordinary() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = draw_scene(rng, (128, 112), 21)
        text = caption(rng, scene).lower()
        assert ("background" in text) or scene.background == "black"
        words = set(text.replace(".", "").split())
        small, large = {"small", "little", "tiny"}, {"large", "big", "huge"}
        sizes = {thing.size for thing in scene.things}
        assert bool(words & small) == ("small" in sizes)
        assert bool(words & large) == ("large" in sizes)


def test_the_nearest_window_is_the_one_that_noise_was_put_on() -> None:
    scene, noise = torch.randn(16, 4, 14, 15), torch.randn(SHAPE)
    for corner in ((0, 0), (4, 5), (2, 3)):
        clean = window(scene, corner, SHAPE)
        assert torch.equal(nearest_window(scene, torch.lerp(clean, noise, 0.7), 0.3), clean)
    every = [window(scene, (y, x), SHAPE) for y in range(5) for x in range(6)]
    for signal in (0.01, 0.9):
        distances = [float((noise - signal * clean).square().sum()) for clean in every]
        assert torch.equal(nearest_window(scene, noise, signal), every[int(np.argmin(distances))])


def test_the_centre_of_a_scene_is_a_frame() -> None:
    scene = torch.arange(16 * 4 * 14 * 15, dtype=torch.float32).view(16, 4, 14, 15)
    assert torch.equal(centre(scene, (10, 10)), scene[:, :, 2:12, 2:12])


@pytest.mark.parametrize("side", [4, 6, 9])
def test_the_middle_of_a_scene_leaves_its_things_in_smaller_windows(side: int) -> None:
    """A thing of 4x3 cells in frames of 10x12: every window shows all or most of its marked cells."""
    scene = torch.zeros(1, 2, 2 * 10 - 4, 2 * 12 - 3)
    scene[:, :, 6:10, 9:12] = 1
    part = middle(scene, (10, 12), side)
    assert part.shape[2:] == (side + max(1, side - 4), side + max(1, side - 3))
    windows = [
        window(part, (y, x), (1, 2, side, side))
        for y in range(part.shape[2] - side + 1)
        for x in range(part.shape[3] - side + 1)
    ]
    shown = [int(one[0, 0].sum()) for one in windows]
    assert max(shown) == 12
    assert min(shown) == 12 if side > 4 else min(shown) >= 9


@pytest.fixture
def lessons() -> Lessons:
    pool = Pool(Path("nowhere"), range(0))
    pool.scenes = [scene_of(seed) for seed in range(2)]
    pool.latents = [torch.randn(16, 4, 12, 11).half() for _ in range(2)]
    return Lessons(MODEL, pool, make_tokenizer(), side=10)


def test_lessons_are_noise_on_clips_and_on_guesses(lessons: Lessons) -> None:
    """The network always guesses zero, so the states made from its guesses are noise alone, like the first ones."""
    network = Network(MODEL, load_recipe("bf16-sla"))

    def velocity(noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        exact = torch.tensor(state_times(MODEL))
        return noisy / exact[(exact[:, None] - times).abs().argmin(0)].view(-1, 1, 1, 1, 1)

    clean = torch.randn(SHAPE).half()
    lessons.pool.latents = [clean, clean]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    noisy, times, text, goal = lessons.draw(velocity, network, rng, generator, 32)
    clean = clean.float()
    assert times.tolist() == pytest.approx([state_times(MODEL)[step] for step in steps_of(32)])
    assert text.shape == (32, 40, 16)
    assert all(torch.equal(one, clean) for one in goal)
    shares = torch.stack([(x * clean).sum() / clean.square().sum() for x in noisy])
    of_clip = torch.zeros(32, dtype=torch.bool)
    first = steps_of(32).count(0)
    of_clip[first + 1 :: 2] = True
    # The share of the clip that is left, up to its chance correlation with noise over some thousand numbers.
    assert torch.allclose(shares[of_clip], 1 - times[of_clip], atol=0.08)
    assert torch.allclose(shares[~of_clip], torch.zeros(int((~of_clip).sum())), atol=0.08)


def test_the_goal_is_near_the_state(lessons: Lessons) -> None:
    network = Network(MODEL, load_recipe("bf16-sla"))
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    noisy, times, _, goals = lessons.draw(lambda x, t, text: x, network, rng, generator, 8)
    windows = [
        window(scene.float(), (y, x), SHAPE) for scene in lessons.pool.latents for y in range(3) for x in range(2)
    ]
    for state, time, goal in zip(noisy, times, goals, strict=True):
        place = next(i for i, each in enumerate(windows) if torch.equal(each, goal))
        of_scene = windows[place // 6 * 6 :][:6]
        distances = [float((state - (1 - time) * each).square().sum()) for each in of_scene]
        assert int(np.argmin(distances)) == place % 6


def test_a_batch_is_shared_among_the_steps() -> None:
    assert [steps_of(32).count(step) for step in range(4)] == [8, 8, 8, 8]
    assert sorted(set(steps_of(8))) == [0, 1, 2, 3]


def test_things_weigh_more_than_background() -> None:
    clean = torch.zeros(1, 16, 3, 10, 10)
    clean[:, :, :, 4:6, 4:6] = 2
    weight = foreground(clean)
    assert float(weight.mean()) == pytest.approx(1)
    assert float(weight[0, 0, 0, 5, 5]) == pytest.approx(4 * float(weight[0, 0, 0, 0, 0]))


def test_words_teach_the_text_encoder_what_is_shown(tmp_path: Path) -> None:
    network = Network(MODEL, load_recipe("bf16-sla"))
    before = {name: value.clone() for name, value in network.dit.state_dict().items()}
    train_words(network, make_tokenizer(), tmp_path, Plan(steps=60, batch=16, rate=1e-2, warmup=5, decay=0.5))
    found = losses(tmp_path / "words.jsonl")
    assert found[-1] < 0.85 * found[0]
    assert all(torch.equal(value, before[name]) for name, value in network.dit.state_dict().items())
    again = Network(MODEL, load_recipe("bf16-sla"), seed=1)
    load_averaged("words", tmp_path, Reader(again))
    assert torch.equal(again.embed([[5, 1]]), network.embed([[5, 1]]))
    alone, pair = (next(s for s in map(scene_of, range(50)) if len(s.things) == count) for count in (1, 2))
    assert answers(alone)[5:10] == [6, 4, 4, 3, 3]
    assert answers(pair)[5] == list(COLOURS).index(pair.things[1].subject.colour)


def test_dense_and_sparse_attention_learn_one_batch(tmp_path: Path, vae: VAE, lessons: Lessons) -> None:
    """The dense phase lowers its loss on two scenes, and the sparse phase continues from its weights."""
    plan = Plan(steps=40, batch=4, rate=3e-3, warmup=5, decay=0.5, muon=True)
    network = Network(MODEL, load_recipe("bf16-sla"))
    train_denoiser("dense", network, lessons, tmp_path, plan, dense_share=1.0)
    found = losses(tmp_path / "dense.jsonl")
    assert found[-1] < 0.97 * found[0]
    linear = [p for name, p in network.named_parameters() if ".proj_l." in name]
    assert not any(p.any() for p in linear)
    sparse = load_averaged("dense", tmp_path, Network(MODEL, load_recipe("bf16-sla")))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), sparse.parameters(), strict=True))
    train_denoiser("sparse", sparse, lessons, tmp_path, replace(plan, steps=4), dense_share=0.0)
    assert all(p.any() for name, p in sparse.named_parameters() if ".proj_l." in name)

    paths = publish(sparse, vae, new_preview(), tmp_path / "files")
    weights = {path.stem: path for path in paths if path.suffix == ".safetensors"}
    assert {tensor.itemsize for path in weights.values() for tensor in load_file(path).values()} == {2}
    bundle = import_checkpoint(MODEL, Sources(weights, paths[-1]), tmp_path / "bundle")
    assert bundle.recipe.name == "bf16-sla"
    assert bundle.model.preview == PREVIEW_SIZES


def test_a_guess_at_the_goal_costs_nothing(lessons: Lessons) -> None:
    network = Network(MODEL, load_recipe("bf16-sla"))
    clean = lessons.pool.latents[0][:, :, :10, :10]
    lessons.pool.latents = [clean, clean]
    exact = torch.tensor(state_times(MODEL))

    def velocity(noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        time = exact[(exact[:, None] - times).abs().argmin(0)].view(-1, 1, 1, 1, 1)
        return (noisy - clean.float() - 0.5) / time

    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    loss, notes = lesson_loss(velocity, network, lessons, 8, rng, generator)
    # The guess is off by a half everywhere: 0.25 over the time squared.
    assert [notes[f"step{step}"] for step in range(4)] == pytest.approx([0.25 / float(t) ** 2 for t in exact], rel=1e-3)
    assert float(loss) == pytest.approx(np.mean([notes[f"step{step}"] for step in steps_of(8)]))


def test_curves_take_the_later_of_two_lines(tmp_path: Path) -> None:
    (tmp_path / "vae.jsonl").write_text('{"step": 20, "loss": 4}\n{"step": 40, "loss": 3}\n{"step": 40, "loss": 1}\n')
    curves(tmp_path, tmp_path / "curves.svg")
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()
    (line,) = (element for element in drawn.iter() if element.tag.endswith("polyline"))
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    floor, ceiling = HEIGHT - MARGIN, MARGIN
    assert heights == pytest.approx([ceiling, floor - (floor - ceiling) / 4])


@pytest.mark.parametrize("dense", [True, False])
def test_the_velocity_is_the_denoisers(dense: bool) -> None:
    network = Network(MODEL, load_recipe("bf16-sla"))
    denoiser = Denoiser(network)
    denoiser.attend(dense)
    expected_dit = Network(MODEL, load_recipe("bf16" if dense else "bf16-sla")).dit
    with torch.no_grad():
        network.dit.head.head.weight.normal_(0, 0.05)
        expected_dit.load_state_dict(network.dit.state_dict(), strict=False)
        latents, text = torch.randn(1, *SHAPE), torch.randn(1, 40, 16)
        expected = expected_dit(latents, torch.tensor([608.0]), text, num_selected=denoiser.selected)
        found = denoiser(latents, torch.tensor([0.608]), text)
    # The products are in bfloat16, which carries eight bits.
    assert float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.03
