"""Every phase of TinyWan's training, on a model of a few thousand weights and clips of a few hundred pixels."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.tinywan.distillation import (
    FLOW_STEPS,
    GUIDED_ABOVE,
    Lessons,
    Teacher,
    state_times,
    steps_of,
    train_student,
)
from tools.tinywan.flow import Velocity, draw_times, foreground, plain_attention, train_teacher
from tools.tinywan.latents import Pool, encode, fill_pool, pixels_of
from tools.tinywan.networks import Network, make_tokenizer, token_ids
from tools.tinywan.pictures import HEIGHT, MARGIN, curves
from tools.tinywan.publish import publish
from tools.tinywan.scenes import caption, draw_scene, vocabulary
from tools.tinywan.sparse import train_sparse
from tools.tinywan.training import Plan, load_averaged, train
from tools.tinywan.vae import new_vae, settle_latents, train_decoder, train_vae
from wanforge.configs.schema import (
    DiTConfig,
    ModelConfig,
    TextEncoderConfig,
    VAEConfig,
    VideoConfig,
    load_model,
    load_recipe,
)
from wanforge.exporter.checkpoint.importer import Sources, import_checkpoint
from wanforge.runtime.quality.held_out import held_out_prompts
from wanforge.runtime.reference.dit import dense_attention
from wanforge.runtime.reference.vae import VAE

TINYWAN = load_model("tools/tinywan/tinywan.toml")
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
SHAPE = (16, 4, 10, 10)
"""Of its latents."""
SHORT = Plan(steps=4, batch=2, rate=1e-3, warmup=1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vae() -> VAE:
    return new_vae(MODEL)


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_what_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def run(folder: Path, *stops: int) -> dict[str, Tensor]:
        for stop in stops:
            network = train_vae(MODEL, new_vae(MODEL), "vae", folder, SHORT, frames=5, side=16, stop_at=stop)
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
    still = pixels_of(MODEL, draw_scene(np.random.default_rng(0), (80, 80)))[:, :, :1].expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        latents = vae.encode(still)
    # Nothing but the small noise of the temporal resamplers tells one time from another yet.
    assert float((latents[:, :, 2:] - latents[:, :, 1:-1]).std()) < 0.05 * float(latents.std())
    train_vae(MODEL, vae, "vae", tmp_path, Plan(steps=24, batch=2, rate=5e-3, warmup=2), frames=1, side=16)
    first, last = losses(tmp_path / "vae.jsonl")
    assert last < first


def test_settled_latents_have_unit_deviation_and_decode_to_the_same(vae: VAE) -> None:
    settled = new_vae(MODEL)
    settle_latents(settled, MODEL, samples=6, seed=5)
    clips = [pixels_of(MODEL, draw_scene(np.random.default_rng(i), (80, 80))) for i in range(3)]
    with torch.no_grad():
        latents = torch.cat([settled.encode(clip) for clip in clips])
        assert 0.7 < float(latents.std()) < 1.4
        before, after = vae.decode(vae.encode(clips[0])), settled.decode(settled.encode(clips[0]))
    assert torch.allclose(before, after, atol=1e-3)


def test_the_decoder_alone_moves(tmp_path: Path) -> None:
    vae = new_vae(MODEL)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    train_decoder(MODEL, vae, tmp_path, Plan(steps=2, batch=1, rate=1e-3, warmup=1))
    moved = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "conv2"}


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
    assert torch.equal(whole.latents[2:], part.latents)
    assert torch.equal(encode(MODEL, vae, whole.scenes[3])[0].half(), whole.latents[3])
    assert growing.scenes == whole.scenes
    assert torch.equal(growing.latents, whole.latents)


def test_captions_say_what_is_shown_in_known_words() -> None:
    tokens, rng = make_tokenizer(), np.random.default_rng(0)
    unknown = tokens.token_to_id("<unk>")
    for _ in range(200):
        scene = draw_scene(rng, (128, 112))
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


def test_times_are_what_the_network_can_be_told() -> None:
    times = draw_times(64, torch.Generator().manual_seed(0))
    assert torch.equal((times * 1000).bfloat16().float(), times * 1000)
    assert float(times.min()) < 0.4
    assert float(times.max()) > 0.95


@pytest.fixture
def lessons() -> Lessons:
    rng, tokens = np.random.default_rng(0), make_tokenizer()
    pool = Pool(Path("nowhere"), range(0))
    pool.scenes = [draw_scene(rng, (80, 80)) for _ in range(2)]
    pool.latents = torch.randn(2, *SHAPE)
    return Lessons(Teacher(Network(MODEL, load_recipe("bf16"))), pool, tokens)


def test_the_teacher_follows_its_flow_to_the_end(lessons: Lessons) -> None:
    """The straight flow from noise to a clip ends at the clip from anywhere on it; guided, it goes too far."""
    noise, clean = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    prompted = [[5, 1], [5, 1], [5, 1]]
    # Without a prompt the text is zeros, and this flow leads half as far.
    lessons.teacher.velocity = lambda latents, times, text: (noise - clean) * (1.0 if text.any() else 0.5)  # type: ignore[assignment]
    times = torch.tensor([0.5, 0.3, 0.95])
    states = torch.lerp(clean, noise, times.view(-1, 1, 1, 1, 1))
    ends = lessons.teacher.end(states, times, prompted)
    assert torch.allclose(ends[:2], clean[:2], atol=1e-5)
    # Guidance of 2 beyond half a velocity is one and a half velocities, on the steps above time 0.6.
    guided = sum(0.95 * (1 - step / FLOW_STEPS) > GUIDED_ABOVE for step in range(FLOW_STEPS))
    beyond = 0.95 * guided / FLOW_STEPS * 0.5
    assert torch.allclose(ends[2], clean[2] + beyond * (clean[2] - noise[2]), atol=1e-5)


def test_lessons_are_noise_on_clips_and_on_guesses(lessons: Lessons) -> None:
    """A student that always guesses zero: the states made from its guesses are noise alone, like the first ones."""
    network = Network(MODEL, load_recipe("bf16"))

    def velocity(noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        exact = torch.tensor(state_times(MODEL))
        return noisy / exact[(exact[:, None] - times).abs().argmin(0)].view(-1, 1, 1, 1, 1)

    lessons.teacher.end = lambda latents, times, prompts: latents + 1  # type: ignore[method-assign]
    lessons.pool.latents = lessons.pool.latents[:1].repeat(2, 1, 1, 1, 1)
    clean = lessons.pool.latents[0]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    noisy, times, text, goal = lessons.draw(velocity, network, rng, generator, 32)  # type: ignore[arg-type]
    assert times.tolist() == pytest.approx([state_times(MODEL)[step] for step in steps_of(32)])
    assert text.shape == (32, 40, 16)
    assert torch.equal(goal, noisy + 1)
    shares = torch.stack([(x * clean).sum() / clean.square().sum() for x in noisy])
    of_clip = torch.zeros(32, dtype=torch.bool)
    of_clip[9::2] = True
    # What is left of the clip, within the chance product of noise with some thousand numbers.
    assert torch.allclose(shares[of_clip], 1 - times[of_clip], atol=0.08)
    assert torch.allclose(shares[~of_clip], torch.zeros(20), atol=0.08)


def test_a_batch_is_shared_among_the_steps() -> None:
    assert [steps_of(32).count(step) for step in range(4)] == [8, 8, 8, 8]
    assert sorted(set(steps_of(8))) == [0, 1, 2, 3]


def test_things_weigh_more_than_background() -> None:
    clean = torch.zeros(1, 16, 3, 10, 10)
    clean[:, :, :, 4:6, 4:6] = 2
    weight = foreground(clean)
    assert float(weight.mean()) == pytest.approx(1)
    assert float(weight[0, 0, 0, 5, 5]) == pytest.approx(4 * float(weight[0, 0, 0, 0, 0]))


def test_teacher_student_and_sparse_attention_learn_one_batch(
    tmp_path: Path, vae: VAE, lessons: Lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase lowers its loss on two clips, and takes up the weights of the one before."""
    monkeypatch.setattr("tools.tinywan.distillation.FLOW_STEPS", 1)
    plan = Plan(steps=40, batch=4, rate=3e-3, warmup=5, decay=0.5, muon=True)
    teacher = Network(MODEL, load_recipe("bf16"))
    train_teacher(teacher, lessons.pool, lessons.tokens, tmp_path, plan)
    student = load_averaged("teacher", tmp_path, Network(MODEL, load_recipe("bf16")))
    assert isinstance(student, Network)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    lessons.teacher = Teacher(teacher)
    train_student(student, lessons, tmp_path, plan)
    sparse = Network(MODEL, load_recipe("bf16-sla"))
    missing = sparse.load_state_dict(student.state_dict(), strict=False).missing_keys
    assert all(".proj_l." in name for name in missing)
    train_sparse(sparse, lessons, tmp_path, replace(plan, steps=4))
    for phase in ("teacher", "student"):
        found = losses(tmp_path / f"{phase}.jsonl")
        assert found[-1] < 0.97 * found[0], phase
    trained = dict(sparse.named_parameters())
    assert all(trained[name].abs().sum() > 0 for name in missing)

    paths = publish(sparse, vae, tmp_path / "files")
    weights = {path.stem: path for path in paths if path.suffix == ".safetensors"}
    assert {tensor.itemsize for path in weights.values() for tensor in load_file(path).values()} == {2}
    bundle = import_checkpoint(MODEL, Sources(weights, paths[-1]), tmp_path / "bundle")
    assert bundle.recipe.name == "bf16-sla"


def test_curves_take_the_later_of_two_lines(tmp_path: Path) -> None:
    (tmp_path / "vae.jsonl").write_text('{"step": 20, "loss": 4}\n{"step": 40, "loss": 3}\n{"step": 40, "loss": 1}\n')
    curves(tmp_path, tmp_path / "curves.svg")
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()
    (line,) = (element for element in drawn.iter() if element.tag.endswith("polyline"))
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    floor, ceiling = HEIGHT - MARGIN, MARGIN
    assert heights == pytest.approx([ceiling, floor - (floor - ceiling) / 4])


def test_the_velocity_is_the_denoisers() -> None:
    network = Network(MODEL, load_recipe("bf16"))
    with torch.no_grad():
        network.dit.head.head.weight.normal_(0, 0.05)
        latents, text = torch.randn(1, *SHAPE), torch.randn(1, 40, 16)
        expected = network.dit(latents, torch.tensor([608.0]), text)
        found = Velocity(network)(latents, torch.tensor([0.608]), text)
    # bfloat16 products: eight bits.
    assert float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.03
