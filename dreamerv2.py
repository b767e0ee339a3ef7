# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6,<3", "gymnasium>=1.3,<2", "ale-py>=0.12.1,<0.13", "numpy>=1.26,<3",
#   "tqdm>=4.66,<5"]
# ///
"""DreamerV2 in one file: learn a model of the game, then learn to play inside it.

"Mastering Atari with Discrete World Models" (Hafner, Lillicrap, Norouzi, Ba; ICLR 2021,
arXiv 2010.02193). A recurrent world model with discrete latents learns from replayed
frames to predict images, rewards and episode ends. An actor and a critic then learn
from nothing but the sequences that this model imagines.

    python dreamerv2.py --game Breakout       # train; the same command resumes the run
    python dreamerv2.py --game Catch --preset small --steps 12000   # minutes on a CPU
    python dreamerv2.py --game Catch --preset small --eval    # watch that agent play
    python -m doctest dreamerv2.py            # execute the examples of this file

THE LOOP, with the paper's numbers. One gradient step is Agent.update_networks.
    play 50 000 decisions at random, storing every row in the replay         Parts 9, 10
    until 50M decisions (200M frames) are played:
        act: z ~ q(z | h, image), action ~ actor(h, z)                           Part 8
        play the action for 4 frames, store the row                          Parts 9, 10
        after every 4th decision, learn from 50 sequences of 50 rows:
            world model: follow the sequences with the RSSM                  Parts 3, 4
                minimise image, reward, discount errors + β KL   [Eq. 2]         Part 5
            imagination: from all 2500 states, 15 steps by the actor             Part 6
                predict rewards, discounts, values; λ-returns    [Eq. 4]         Part 7
            critic: move v(z) towards the returns                [Eq. 5]         Part 7
            actor: make actions with return > v(z) likelier      [Eq. 6]         Part 7
            after the 1st, 101st, ... : slow critic <- critic                    Part 8
        now and then evaluate, draw a dream, log metrics, save              Parts 11, 12

MAP. Each part opens with what goes in and out, and with a question, "Predict", that a
doctest of the part answers. The algorithm is Parts 2 to 8.
    Part 1  | Configuration                 paper, appendix: hyper parameters
    Part 2  | Gradient tricks (Alg. 1, 2)   Section 2.1
    Part 3  | Networks                      Section 2.1
    Part 4  | RSSM (Eq. 1)                  Section 2.1, Figure 2
    Part 5  | World model (Eq. 2)           Section 2.1, Figure 2
    Part 6  | Imagination                   Section 2.2, Figure 3
    Part 7  | Returns and losses (Eq. 4-6)  Section 2.2
    Part 8  | Agent (Eq. 3)                 Section 2.2
    Part 9  | Replay
    Part 10 | Environments                  Section 3
    Part 11 | Looking
    Part 12 | Running

SHAPES. Time comes first, so x[t] is the paper's x with subscript t.
    T  steps of a replayed sequence  50      S  latent variables            32
    B  sequences in a batch          50      K  classes of each latent      32
    N  what runs in parallel: start          D  units of the GRU state h   600
       states in imagination, T*B  2500      F  feature [z, h], S*K + D   1624
       environments elsewhere         1      E  embedded image            1536
    H  imagined steps                15      A  actions                     18
                                             C  image channels (gray)        1

TIME. One row of experience is what the environment returns from one step. The action
stored at t is the one that LED to image t, and the reward at t ARRIVED with it:

    row            0            1            2            3 (new episode)
    action         0 (none)     a0           a1           0 (none)
    image          x0           x1           x2           x0'
    reward         0            r1           r2           0
    is_first       yes          no           no           yes
    is_terminal    no           no           yes          no

So h[t] = f(h[t-1], z[t-1], action[t]), where the paper writes the same action as
a_{t-1}. Imagination follows the same rule: actions[t+1] is chosen IN state t and leads
to state t+1, and the reward predicted at state t is the one received on arriving there.

SYMBOLS.
    paper        here                       authors' code
    γ_t          discount[t]                discount; its target is γ·(1 - is_terminal)
    h_t          state.h                    deter
    z_t, ẑ_t     state.z                    stoch
    (h_t, z_t)   state.feature, as [z, h]   feat
    q(z|h,x)     posterior                  post
    p(ẑ|h)       prior                      prior
    α, β         kl_balance, kl_scale       kl.balance, loss_scales.kl
    v, slow v    critic, slow_critic        critic, target_critic
    V^λ_t        returns[t]                 target
    ρ            reinforce_mix              actor_grad_mix, which is 1 - ρ
    η            entropy_scale              actor_ent
    sg(x)        x.detach()                 tf.stop_gradient

VOICES. "Paper:" what it says; "Authors' code:" what danijar/dreamerv2 does (07d906e,
version 2.2.0, unless another is named); "Here:" our own choice. The paper's table gives
the defaults; where it is silent, the authors' code does.

DEPARTURES: where the sources disagree, or this file leaves one of them. Each has a flag
that switches it or a test that holds it.
         paper              version 2.2.0          here             switch or test
    D1   4 decisions/step   16                     4                --steps-per-update
    D2   γ: table 0.995     0.999                  0.995            --gamma
    D3   50 sequences       16, before it 50       50               --batch-size
    D4   baseline v(z_t)    slow v(z_t)            v(z_t)           --slow-baseline
    D5   V_t - v(z_t)       V_{t+1} - v(z_t)       V_t - v(z_t)     --shifted-advantage
    D6   all 18 actions     those a game uses      all 18           --full-action-space
    D7   losses are sums    means                  means           test_losses_are_means
    D8   in one episode     in one episode         any start      test_replay_is_uniform
    D9   not said           m̂/(√v̂ + ε/√(1-β₂ᵗ))    m̂/(√v̂ + ε)      test_parity_agent
    D10  no-ops not said    1 to 30                0 to 29          --max-noops
    D11  not said           float16                bfloat16, CUDA   --precision
    D12  not said           slow critic random     born as a copy   test_slow_critic
    D13  not said           γ[0] 0 after an end    the same         test_true_start
    D14  discount loss x 1  x 5                    x 5              --discount-scale
    D15  84² to 64² pixels  64² at once            64² at once      test_atari_protocol
    D16  states 1 to H      states 0 to H          states 0 to H  test_parity_behaviour

COST at the paper's size: 22.2M parameters, 12.5M gradient steps of 2.37 TFLOP, a replay
of 8.35 GB; the authors' V100 took under 10 days. Two CPU cores need 15 to 21 s a step,
or 0.16 s with --preset small. HEALTHY: image_loss sinks towards 3764 (no error at all),
kl rises to some nats, actor_entropy sinks slowly from ln 18 = 2.89. Scores rise
after some 20M frames in Breakout, within 2M in Boxing, Freeway and Pong.
NOT REPRODUCED: the paper's scores. Nothing was trained here at the paper's size; that
losses, gradients and updates are right is shown by numbers from the authors' code.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import re
import signal
import sqlite3
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

# After a parallel operation idle OpenMP threads keep their cores busy while they wait.
# Beside another busy process a gradient step then takes 100 times as long. So they wait
# that way for a moment only, then sleep. OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

__version__ = "0.2.0"


# %% Part 1 | Configuration
# Every number of the algorithm. Only Agent.__init__ and Part 12 read it: everything
# between takes plain numbers. In: nothing. Out: one Config.
# Predict: how many gradient steps does the paper's run of 50M decisions make?


@dataclasses.dataclass
class Config:
    """The settings of a run. Each field is a flag, its comment is the flag's help.

    >>> (Config.steps - Config.prefill_steps) // Config.steps_per_update
    12487500
    """
    # Run
    game: str = "Breakout"  # Atari game, Catch, or any Gymnasium id with images
    preset: str = "auto"  # see PRESETS; auto: atari on CUDA, else small
    steps: int = 50_000_000  # decisions to play in all; paper: 50M = 200M frames
    logdir: str = ""  # folder of the run; empty: runs/GAME-PRESET-seedSEED
    seed: int = 0  # of weights, sampling and environments
    device: str = "auto"  # auto (CUDA, else CPU) | cuda | cuda:1 | mps | cpu
    precision: str = "auto"  # auto (bf16 if CUDA has it) | fp32 | bf16 [D11]
    cuda_graphs: bool = True  # on CUDA, record a step as a CUDA graph and replay it
    # Environment
    num_envs: int = 1  # environments played side by side; paper: 1
    action_repeat: int = 4  # frames per decision (Atari, Box actions); paper: 4
    sticky: float = 0.25  # chance a frame keeps the last action (Atari); paper: 0.25
    max_noops: int = 29  # most no-op frames at a reset (Atari); authors' code: 30 [D10]
    time_limit: int = 27_000  # decisions after which an episode is cut; 108 000 frames
    full_action_space: bool = True  # all 18 Atari actions; paper: yes [D6]
    # Replay and schedule
    replay_capacity: int = 2_000_000  # rows kept, oldest dropped first; paper: 2M
    prefill_steps: int = 50_000  # random decisions before training; authors' code: 50k
    steps_per_update: int = 4  # decisions per gradient step; paper: 4 [D1]
    batch_size: int = 50  # sequences, B; paper: 50 [D3]
    seq_len: int = 50  # steps of a sequence, T; paper: 50
    # World model
    num_latents: int = 32  # categorical variables of z, S; paper: 32
    num_classes: int = 32  # classes of each, K; paper: 32
    deter_size: int = 600  # units of the GRU state h, D; paper: 600
    hidden_size: int = 600  # units of the RSSM's one-layer heads; paper: 600
    cnn_depth: int = 48  # first convolution's channels, then doubled; authors' code: 48
    mlp_layers: int = 4  # hidden layers of every head, actor and critic; paper: 4
    mlp_units: int = 400  # units of each of those layers; paper: 400
    kl_scale: float = 0.1  # weight β of the KL; paper: 0.1; new tasks: 0.1 0.3 1 3
    kl_balance: float = 0.8  # share of the KL that trains the prior, α; paper: 0.8
    free_nats: float = 0.0  # no KL gradient while its mean is less; authors' code: 0
    discount_scale: float = 5.0  # weight of the discount loss; authors' code: 5 [D14]
    discount_head: bool = True  # predict episode ends; no: every discount is γ
    reward_tanh: bool = True  # learn tanh(r) instead of r; paper: yes for Atari
    model_lr: float = 2e-4  # learning rate of the world model; paper: 2e-4
    # Behaviour
    horizon: int = 15  # imagined steps, H; paper: 15
    gamma: float = 0.995  # discount γ; paper's table: 0.995 [D2]
    return_lambda: float = 0.95  # λ of the return; paper: 0.95
    reinforce_mix: float = 1.0  # ρ: 1 is all Reinforce, 0 (always for Box) dynamics
    entropy_scale: float = 1e-3  # weight of the policy's entropy, η; paper: 1e-3
    anneal_steps: int = 0  # decisions in which ρ and η move to their ends; 0: never
    reinforce_mix_end: float = 1.0  # ρ after anneal_steps
    entropy_scale_end: float = 3e-4  # η after anneal_steps
    actor_lr: float = 4e-5  # learning rate of the actor; paper: 4e-5
    critic_lr: float = 1e-4  # learning rate of the critic; paper: 1e-4
    slow_every_updates: int = 100  # gradient steps between slow copies; paper: 100
    slow_baseline: bool = False  # take the baseline from the slow critic [D4]
    shifted_advantage: bool = False  # credit a_t with V_{t+1} instead of V_t [D5]
    # Ablations: the paper's Table 2 gives gamer median and clipped record mean
    layer_norm: bool = True  # normalise the GRU's gates; 1.64, 0.25; off: 1.66, 0.25
    reward_gradients: bool = True  # reward loss trains the RSSM; off: 1.68, 0.24
    discrete_latents: bool = True  # z is categorical; off (Gaussian): 1.08, 0.19
    kl_balancing: bool = True  # Algorithm 2; off, the plain KL: 0.84, 0.16
    policy_reinforce: bool = True  # Reinforce gradients; off, ρ = 0: 0.69, 0.15
    image_gradients: bool = True  # image loss trains the RSSM; off: 0.04, 0.01
    # What DreamerV3 changed, see the end of Part 2; preset v3 turns all four on
    symexp_twohot: bool = False  # reward head and critic: a cross-entropy on 255 bins
    free_bits: float = 0.0  # nats that each KL term of a state is free of; V3: 1
    return_scale: float = 0.0  # advantages over max(this, range of returns); V3: 1
    unimix: float = 0.0  # share of a uniform in latents and policy; V3: 0.01
    # Optimisers
    adam_eps: float = 1e-5  # Adam's epsilon; paper: 1e-5
    grad_clip: float = 100.0  # largest global gradient norm, per optimiser; paper: 100
    weight_decay: float = 1e-6  # every weight shrinks by this share a step; paper: 1e-6
    # Logging
    log_every_steps: int = 2_500  # decisions between lines of metrics.jsonl
    eval_every_steps: int = 100_000  # decisions between evaluations, and between dreams
    eval_episodes: int = 1  # of an evaluation, 0: none, nor dreams; authors' code: 1
    checkpoint_minutes: float = 1.0  # minutes between checkpoints; 0: every decision


# Strings of flags, which those of the command line override.
PRESETS = {
    "atari": "",
    # The authors' code, version 2.2.0, but for D8 to D12 and its replay of episodes.
    "released": "--steps-per-update 16 --batch-size 16 --gamma 0.999 --slow-baseline"
    " --shifted-advantage --no-full-action-space --max-noops 30",
    # The paper's row of that name: the authors' first version, faf9e4c, but for D13.
    "schedules": "--gamma 0.999 --anneal-steps 2500000 --reinforce-mix 0.9"
    " --entropy-scale 3e-3",
    # The authors' dmc (0216d33), but for 100 first updates, steps, replay, evaluations.
    "continuous": "--steps 500000 --action-repeat 2 --replay-capacity 500000"
    " --prefill-steps 2500 --steps-per-update 5 --deter-size 200 --hidden-size 200"
    " --kl-scale 1 --free-nats 1 --no-discount-head --no-reward-tanh --model-lr 3e-4"
    " --gamma 0.99 --reinforce-mix 0 --entropy-scale 1e-4 --actor-lr 8e-5"
    " --critic-lr 8e-5 --eval-every-steps 10000",
    # DreamerV3's four changes; all the rest stays DreamerV2's. It weighs the prior's KL
    # by β·α = 1 and the posterior's by β·(1 - α) = 0.1.
    "v3": "--symexp-twohot --no-reward-tanh --free-bits 1 --kl-scale 1.1"
    " --kl-balance 0.9090909 --return-scale 1 --unimix 0.01 --entropy-scale 3e-4",
    # For a CPU, by trial on Catch, Boxing and Kung-Fu Master, with V3's return scale.
    "small": "--steps 100000 --no-full-action-space --replay-capacity 100000"
    " --prefill-steps 2500 --batch-size 16 --seq-len 16 --num-latents 16"
    " --num-classes 16 --deter-size 128 --hidden-size 128 --cnn-depth 8 --mlp-layers 2"
    " --mlp-units 128 --kl-scale 0.3 --model-lr 6e-4 --gamma 0.99 --anneal-steps 10000"
    " --entropy-scale 1e-1 --entropy-scale-end 3e-3 --return-scale 1 --actor-lr 4e-4"
    " --critic-lr 1e-3 --slow-every-updates 50 --log-every-steps 1000"
    " --eval-every-steps 10000 --eval-episodes 3",
    # For tests: seconds.
    "debug": "--steps 800 --time-limit 80 --replay-capacity 1000 --prefill-steps 200"
    " --batch-size 4 --seq-len 8 --num-latents 4 --num-classes 4 --deter-size 16"
    " --hidden-size 16 --cnn-depth 2 --mlp-layers 2 --mlp-units 16 --horizon 4"
    " --slow-every-updates 10 --log-every-steps 200 --eval-every-steps 400",
}


# %% Part 2 | Gradient tricks (Alg. 1, 2)
# Two ideas make discrete latents trainable: a sample that carries the gradient of its
# probabilities, and a KL that pulls the prior harder than the posterior.
# In: logits (..., S, K). Out: a one-hot sample of the same shape; nats per step (...).
# Predict: if prior and posterior are equal, what are the KL and its gradient?


def straight_through_sample(logits: Tensor) -> Tensor:
    """One-hot sample that passes gradients as if it were the probabilities. [Alg. 1]
        sample = one_hot(draw(logits)),  probs = softmax(logits)
        return sample + probs - sg(probs)
    logits (..., K), float32 -> (..., K), exactly one-hot, with the softmax's gradient:
    biased, but of little variance. Here: the draw is a race. Of K alarms that ring
    after random times -ln(uniform) / probs, class k's is the first with probability
    probs[k]. Unlike torch.multinomial, that needs no CPU-GPU synchronisation.
    >>> _ = torch.manual_seed(0)
    >>> logits = torch.tensor([0.0, math.log(3.0)], requires_grad=True)   # probs ¼, ¾
    >>> round(straight_through_sample(logits.expand(9000, 2))[:, 1].mean().item(), 2)
    0.75
    >>> straight_through_sample(logits)[1].backward()
    >>> round(logits.grad[1].item(), 4)      # d probs[1] / d logits[1] = ¾·(1 - ¾)
    0.1875
    """
    probs = logits.softmax(-1)
    minus_times = torch.rand_like(probs).log() / probs.detach()
    first = minus_times.argmax(-1, keepdim=True)
    sample = torch.zeros_like(probs).scatter_(-1, first, 1.0)
    if not logits.requires_grad:  # as in imagination with ρ = 1
        return sample
    # Without the two probs the sample is a constant: no loss would reach the encoder
    # through z. In brackets they cancel exactly, so the value stays one-hot.
    return sample + (probs - probs.detach())


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last axis, (..., K) -> (...); at most ln K.
    >>> [round(S * categorical_entropy(torch.zeros(K)).item(), 2)
    ...  for S, K in ((1, 18), (32, 32))]       # the most for a policy, and for z
    [2.89, 110.9]
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of S independent categoricals, (..., S, K) twice -> (...).
        KL(p ‖ q) = Σ_s Σ_k p[s, k] · (ln p[s, k] - ln q[s, k])
    It is not symmetric: p, the first argument, weighs the logs.
    >>> p = torch.tensor([[1.0, 1.0]]).log()                # one latent, ½ ½
    >>> q = torch.tensor([[3.0, 1.0]]).log()                # one latent, ¾ ¼
    >>> round(categorical_kl(p, q).item(), 4)               # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    0.1438
    >>> round(categorical_kl(q, p).item(), 4)               # ¾ ln(¾ / ½) + ¼ ln(¼ / ½)
    0.1308
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def balanced_kl(posterior: Tensor, prior: Tensor, alpha: float | None,
                kl=categorical_kl, free_bits: float = 0.0):
    """KL balancing: train the prior faster than the posterior. [Alg. 2]
        loss = α KL(sg(posterior) ‖ prior) + (1 - α) KL(posterior ‖ sg(prior))
    posterior, prior: logits (..., S, K) -> (loss, kl), each (...) in nats. Both terms
    have the same value, so loss equals kl; only the gradients differ. The first teaches
    the prior to predict, the second keeps the posterior predictable. The direction is
    always KL(posterior ‖ prior). α = None is the plain KL, with its full gradient to
    both (--no-kl-balancing); authors' code by α = 0.5, which here halves gradients.
    >>> post = torch.tensor([[1.0, 1.0]]).log().requires_grad_()
    >>> prior = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    >>> loss, kl = balanced_kl(post, prior, alpha=0.75)
    >>> loss.backward()
    >>> prior.grad[0, 0].item()                             # α · (¾ - ½)
    0.1875
    >>> round(post.grad[0, 0].item(), 4)                    # (1 - α) · ½ (ln(½/¾) - KL)
    -0.0687
    >>> loss, _ = balanced_kl(post, post.detach(), alpha=0.75)    # equal: KL 0 ...
    >>> loss.item(), torch.autograd.grad(loss, post)[0].tolist()    # ... and no pull
    (0.0, [[0.0, 0.0]])

    DreamerV3's free bits: max(free_bits, KL) of each term in each state. A KL below
    that has no gradient, so that latents may carry a little information at no cost.
    >>> balanced_kl(post, prior, 0.75, free_bits=1.0)[0].item()      # the KL is 0.14
    1.0
    """
    if alpha is None:
        nats = kl(posterior, prior)
        return nats.clamp(min=free_bits), nats.detach()
    nats = kl(posterior.detach(), prior)
    train_prior = nats.clamp(min=free_bits)
    train_posterior = kl(posterior, prior.detach()).clamp(min=free_bits)
    # Without the balance the posterior is dragged towards a prior that has learned
    # nothing yet. Paper, Table 2: the gamer median falls from 1.64 to 0.84.
    return alpha * train_prior + (1 - alpha) * train_posterior, nats.detach()


def gaussian(params: Tensor) -> torch.distributions.Normal:
    """(..., 2K), means and then s -> K independent normals. Authors' code: the
    deviation is 2·σ(s / 2) + 0.1, between 0.1 and 2.1."""
    mean, s = params.chunk(2, -1)
    std = 2 * torch.sigmoid(s / 2) + 0.1
    return torch.distributions.Normal(mean, std, validate_args=False)


def gaussian_kl(p_params: Tensor, q_params: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of S·K independent normals, (..., S, 2K) twice -> (...).
        Σ  ln(σ_q / σ_p) + (σ_p² + (μ_p - μ_q)²) / 2σ_q² - ½
    >>> p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.1, 0.0]])     # both σ = 1.1
    >>> round(gaussian_kl(p, q).item(), 4)                       # one σ apart
    0.5
    """
    p, q = gaussian(p_params), gaussian(q_params)
    return torch.distributions.kl_divergence(p, q).sum((-2, -1))


def gaussian_entropy(params: Tensor) -> Tensor:
    """Entropy in nats, summed over K, (..., S, 2K) -> (..., S)."""
    return gaussian(params).entropy().sum(-1)


class OneHot:
    """The policy over A discrete actions, one-hot, from finite logits (..., A)."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    @property
    def mode(self) -> Tensor:
        """The likeliest action, (..., A)."""
        return F.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).float()

    def rsample(self) -> Tensor:
        """An action (..., A) that carries the gradient of the probabilities."""
        return straight_through_sample(self.logits)

    def log_prob(self, action: Tensor) -> Tensor:
        """ln of the probability of actions (..., A) -> (...)."""
        return (self.logits.log_softmax(-1) * action).sum(-1)

    def entropy(self) -> Tensor:
        """In nats, (...); at most ln A."""
        return categorical_entropy(self.logits)


class TruncatedNormal:
    """The policy over A continuous actions in [-1, 1]: a normal without its tails, from
    the actor's params (..., 2A), see gaussian; a tanh keeps the mode inside.
    >>> policy = TruncatedNormal(torch.zeros(9000, 2))     # mode 0, deviation 1.1
    >>> policy.rsample().abs().max().item() <= 1, round(policy.entropy()[0].item(), 3)
    (True, 0.686)
    """

    def __init__(self, params: Tensor):
        raw = gaussian(params)
        self.mode = raw.mean.tanh()
        self.normal = torch.distributions.Normal(
            self.mode, raw.stddev, validate_args=False)
        self.below = self.normal.cdf(-1)  # the probability of the lower tail, cut off
        self.inside = self.normal.cdf(1) - self.below  # the probability that is left

    def rsample(self) -> Tensor:
        """An action (..., A), from uniform noise; mode and deviation get gradients."""
        p = self.below + self.inside * torch.rand_like(self.mode)
        return self.normal.icdf(p.clamp(1e-6, 1 - 1e-6)).clamp(-1, 1)

    def log_prob(self, action: Tensor) -> Tensor:
        """ln of the density at actions (..., A) -> (...)."""
        return (self.normal.log_prob(action) - self.inside.log()).sum(-1)

    def entropy(self) -> Tensor:
        """In nats, (...); at most A·ln 2, that of uniform actions."""
        low = (-1 - self.mode) * self.normal.log_prob(-1).exp()
        high = (1 - self.mode) * self.normal.log_prob(1).exp()
        cut = (low - high) / (2 * self.inside)
        return (self.normal.entropy() + self.inside.log() + cut).sum(-1)


def unimix(logits: Tensor, share: float) -> Tensor:
    """Logits (..., K) of (1 - share)·softmax(logits) + share / K: no class is ruled
    out, so that no KL and no ln p becomes huge. This and what follows is DreamerV3's.
    >>> unimix(torch.tensor([0.0, 100.0]), 0.5).exp().tolist()
    [0.25, 0.75]
    """
    if not share:
        return logits
    return ((1 - share) * logits.softmax(-1) + share / logits.shape[-1]).log()


def symlog(x: Tensor) -> Tensor:
    """sign(x)·ln(|x| + 1): nearly x around 0, a logarithm far away."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x)·(exp(|x|) - 1), its inverse.
    >>> [round(x, 3) for x in symexp(torch.tensor([-1.0, 0.0, 2.0])).tolist()]
    [-1.718, 0.0, 6.389]
    """
    return x.sign() * x.abs().expm1()


def head_mean(out: Tensor) -> Tensor:
    """The number that a head predicts, (...): its output (..., 1), or softmax(out)·bins
    if it has K logits (..., K), K odd, for the bins symexp(-20 ... 20). Those reach
    ±5e8, where rounding errors would not cancel, so each is added with its negative:
    >>> head_mean(torch.zeros(255)).item()
    0.0
    """
    if out.shape[-1] == 1:
        return out.squeeze(-1)
    half, probs = out.shape[-1] // 2, out.softmax(-1)
    bins = symexp(torch.linspace(0, 20, half + 1, device=out.device)[1:])
    return ((probs[..., half + 1:] - probs[..., :half].flip(-1)) * bins).sum(-1)


def twohot_nll(out: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a head with bins, out (..., K), target y (...) -> (...).
        - Σ_k twohot(y)[k] · ln softmax(out)[k]
    The two bins around y share its weight of 1 linearly. Its gradient does not grow
    with y, as that of a squared error does: rewards of any size need no tanh.
    >>> out = torch.tensor([0.1, 0.2, 0.7]).log()           # at symexp of -20, 0, 20
    >>> y = symexp(torch.tensor(20.0)) / 4                  # ¾ at 0, ¼ at the last
    >>> round(twohot_nll(out, y).item(), 3)                 # -(¾ ln 0.2 + ¼ ln 0.7)
    1.296
    """
    bins = symexp(torch.linspace(-20, 20, out.shape[-1], device=out.device))
    above = torch.searchsorted(bins, target.contiguous()).clamp(1, len(bins) - 1)
    share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
    log_p, index = out.log_softmax(-1), above[..., None]
    lower, upper = log_p.gather(-1, index - 1), log_p.gather(-1, index)
    return -torch.lerp(lower[..., 0], upper[..., 0], share.clamp(0, 1))


# %% Part 3 | Networks
# Plain feed-forward pieces and the one recurrent cell.
# In: images (..., C, 64, 64) in [-½, ½], or features (..., F). Out: embeddings, means.
# Predict: four convolutions of kernel 4 and stride 2 on 64 pixels: how many are left?


def glorot_init(module: nn.Module) -> None:
    """Keras's initialisation, for `network.apply(glorot_init)`: uniform Glorot weights,
    zero biases. torch's own are smaller (by √3 in square layers), its biases random."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ToFloat32(nn.Module):
    """Ends a head: losses need float32 even where autocast multiplies in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def mlp(in_size: int, out_size: int, layers: int = 4, units: int = 400):
    """(..., in_size) -> (..., out_size): hidden layers with ELU, a linear output."""
    network, size = [], in_size
    for _ in range(layers):
        network += [nn.Linear(size, units), nn.ELU()]
        size = units
    return nn.Sequential(*network, nn.Linear(size, out_size), ToFloat32())


class ConvEncoder(nn.Module):
    """Images (N, ..., C, 64, 64) -> embeddings (N, ..., 32·depth).
    >>> encoder = ConvEncoder(1, depth=48)
    >>> encoder(torch.zeros(7, 1, 64, 64)).shape    # 64 -> 31 -> 14 -> 6 -> 2; 2·2·384
    torch.Size([7, 1536])
    """
    def __init__(self, channels: int, depth: int = 48):
        super().__init__()
        layers = []
        for size in (depth, 2 * depth, 4 * depth, 8 * depth):
            layers += [nn.Conv2d(channels, size, 4, stride=2), nn.ELU(inplace=True)]
            channels = size
        self.embed_dim = 2 * 2 * channels
        self.net = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        out = self.net(image.flatten(0, -4))
        return out.reshape(*image.shape[:-3], self.embed_dim)


class ConvDecoder(nn.Module):
    """Features (N, ..., F) -> mean images (N, ..., C, 64, 64).
    The linear layer makes a 1×1 image, without activation; the others grow it.
    >>> decoder = ConvDecoder(1624, 1, depth=48)
    >>> decoder(torch.zeros(7, 1624)).shape                 # 1 -> 5 -> 13 -> 30 -> 64
    torch.Size([7, 1, 64, 64])
    """
    def __init__(self, feature_size: int, channels: int, depth: int = 48):
        super().__init__()
        self.linear = nn.Linear(feature_size, 32 * depth)
        self.net = nn.Sequential(
            nn.ConvTranspose2d(32 * depth, 4 * depth, 5, 2),
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(4 * depth, 2 * depth, 5, 2),
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * depth, depth, 6, 2),
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(depth, channels, 6, 2),
        )

    def forward(self, feature: Tensor) -> Tensor:
        # On a 1×1 image a transposed convolution of kernel 5 is 25 matrix products, one
        # for each output pixel; as a single one it takes a third of the time or less.
        weight, bias = self.net[0].weight.permute(0, 2, 3, 1), self.net[0].bias
        out = self.linear(feature).flatten(0, -2) @ weight.flatten(1)
        out = out.unflatten(-1, weight.shape[1:]).permute(0, 3, 1, 2)
        out = self.net[1:-1](out + bias[:, None, None])
        # The last layer, of kernel 6 and stride 2, uses every other row and column of
        # its kernel for an output pixel: four kernels of 3×3, whose outputs interleave.
        # As one convolution that takes a half to three quarters of the time on a CPU.
        weight, bias = self.net[-1].weight, self.net[-1].bias
        weight = weight.unflatten(3, (3, 2)).unflatten(2, (3, 2)).flip(2, 4)
        weight = weight.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)  # (4·C, depth, 3, 3)
        out = F.pixel_shuffle(F.conv2d(out, weight, padding=2), 2)
        out = out + bias[:, None, None]
        return out.reshape(*feature.shape[:-1], *out.shape[1:]).float()


class LayerNormGRUCell(nn.Module):
    """The authors' GRU: one linear, one layer norm over all three gates together.
        reset, cand, update = split(LayerNorm(W [x, h] + b))
        c  = tanh(σ(reset) · cand)
        u  = σ(update - 1)
        h' = u · c + (1 - u) · h
    x (..., input), h (..., D) -> h' (..., D). Beside the norm, three things differ from
    torch's GRUCell: the reset gate scales all of the candidate, input part too; the
    bias of -1 makes it slow to forget at first (u = σ(-1) = 0.27); u weighs the NEW
    candidate. The norm is the model's only one; ε is Keras's 1e-3. Without it
    (--no-layer-norm) the gamer mean falls from 11.33 to 5.95, the median does not.
    >>> cell = LayerNormGRUCell(2, 1)
    >>> for p in cell.parameters(): _ = nn.init.zeros_(p)   # all gates zero
    >>> round(cell(torch.zeros(1, 2), torch.ones(1, 1)).item(), 4)      # 1 - σ(-1)
    0.7311
    """
    def __init__(self, input_size: int, hidden_size: int, layer_norm: bool = True):
        super().__init__()
        size = 3 * hidden_size
        self.linear = nn.Linear(input_size + hidden_size, size)
        self.norm = nn.LayerNorm(size, eps=1e-3) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gates = self.norm(self.linear(torch.cat([x, h.to(x.dtype)], -1)).float())
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # The -1 keeps most of h at first; without it each step would overwrite half.
        update = torch.sigmoid(update - 1)
        return torch.lerp(h, candidate, update)  # u · c + (1 - u) · h


# %% Part 4 | RSSM (Eq. 1)
# The recurrent state-space model: what the agent believes about the world.
#
#     h[t] = f(h[t-1], z[t-1], action[t])        recurrent model, deterministic
#     z[t] ~ q(z | h[t], x[t])                   posterior: it has seen the image
#     ẑ[t] ~ p(ẑ | h[t])                         prior: it has to guess
#
#      z[t-1] ──┐                 ┌── x[t] (embedded)
#   action[t] ──┴─► GRU ─► h[t] ──┴─► posterior ─► z[t] ──► next step
#      h[t-1] ──────┘        └──────► prior, trained towards the posterior
#
# In: embeddings (T, B, E), actions (T, B, A), is_first (T, B). Out: states (T, B, ...).
# Predict: with S = 3 variables of K = 4 classes and D = 8, how long is a feature?


class State(NamedTuple):
    """What the model believes at one moment; leading axes are (T, B) or (N,)."""
    h: Tensor  # (..., D) the deterministic, recurrent part
    z: Tensor  # (..., S, K) the stochastic part, S one-hot vectors
    logits: Tensor  # (..., S, K) of the distribution that z was drawn from

    @property
    def feature(self) -> Tensor:
        """[z, h] (..., S·K + D): what every head, the actor and the critic see."""
        return torch.cat([self.z.flatten(-2), self.h], -1)


class RSSM(nn.Module):
    """Recurrent state-space model with categorical latents. [Eq. 1]
    `img_step` goes on without an image (imagination), `obs_step` with one (acting), and
    `observe` through a whole sequence (training).
    >>> rssm = RSSM(action_dim=2, embed_dim=12, num_latents=3, num_classes=4,
    ...             deter_size=8, hidden_size=7)
    >>> posterior, prior_logits = rssm.observe(
    ...     torch.zeros(5, 6, 12), torch.zeros(5, 6, 2), torch.zeros(5, 6).bool())
    >>> posterior.h.shape, posterior.z.shape, prior_logits.shape
    (torch.Size([5, 6, 8]), torch.Size([5, 6, 3, 4]), torch.Size([5, 6, 3, 4]))
    >>> posterior.feature.shape                                          # 3·4 + 8
    torch.Size([5, 6, 20])
    """

    params_per_class = 1  # its logit

    def __init__(self, action_dim: int, embed_dim: int, num_latents: int = 32,
                 num_classes: int = 32, deter_size: int = 600, hidden_size: int = 600,
                 layer_norm: bool = True, unimix: float = 0.0):
        super().__init__()
        self.latent_shape, self.unimix = (num_latents, num_classes), unimix
        self.deter_size = deter_size
        latent_size = num_latents * num_classes
        self.feature_size = latent_size + deter_size
        self.img_in = nn.Linear(latent_size + action_dim, hidden_size)
        self.cell = LayerNormGRUCell(hidden_size, deter_size, layer_norm)
        self.prior_in = nn.Linear(deter_size, hidden_size)
        self.prior_out = nn.Linear(hidden_size, self.params_per_class * latent_size)
        self.post_in = nn.Linear(deter_size + embed_dim, hidden_size)
        self.post_out = nn.Linear(hidden_size, self.params_per_class * latent_size)

    def initial(self, n: int) -> State:
        """Initial states of n sequences: zeros, which are not learned."""
        h = self.img_in.weight.new_zeros(n, self.deter_size)
        z = h.new_zeros(n, *self.latent_shape)
        return State(h, z, z.repeat(1, 1, self.params_per_class))

    def sample(self, logits: Tensor) -> Tensor:
        """A sample z (..., S, K) from the distribution of these logits."""
        return straight_through_sample(logits)

    def recurrent(self, state: State, action: Tensor) -> Tensor:
        """h[t] = f(h[t-1], z[t-1], action[t]), (N, D)."""
        x = F.elu(self.img_in(torch.cat([state.z.flatten(-2), action], -1)))
        return self.cell(x, state.h)

    def prior_logits(self, h: Tensor) -> Tensor:
        """Logits of p(ẑ[t] | h[t]), (..., D) -> (..., S, K)."""
        return self.to_logits(self.prior_out(F.elu(self.prior_in(h))))

    def to_logits(self, out: Tensor) -> Tensor:
        """What a layer puts out, (..., S·K) -> (..., S, K) in float32."""
        logits = out.float().unflatten(-1, (self.latent_shape[0], -1))
        return unimix(logits, self.unimix)

    def img_step(self, state: State, action: Tensor) -> State:
        """One step without an image: z comes from the prior. action (N, A)."""
        h = self.recurrent(state, action)
        logits = self.prior_logits(h)
        return State(h, self.sample(logits), logits)

    def restart(self, state: State, action: Tensor, is_first: Tensor):
        """State and action, zeroed where is_first: the next step is a fresh start."""
        # Without this mask a new episode would go on with the old one's memory.
        first = is_first[:, None]
        h, action = state.h.masked_fill(first, 0), action.masked_fill(first, 0)
        return State(h, state.z.masked_fill(first[..., None], 0), logits=None), action

    def obs_step(self, state: State, action: Tensor, embed: Tensor,
                 is_first: Tensor) -> State:
        """One step with an image: z comes from the posterior. state of t-1; action
        (N, A) that led here; embed (N, E) and is_first (N,) of t."""
        h = self.recurrent(*self.restart(state, action, is_first))
        out = self.post_out(F.elu(self.post_in(torch.cat([h, embed], -1))))
        logits = self.to_logits(out)
        return State(h, self.sample(logits), logits)

    def observe(self, embeds: Tensor, actions: Tensor, is_first: Tensor,
                state: State | None = None) -> tuple[State, Tensor]:
        """A whole sequence with images: obs_step, T times.
        embeds (T, B, E), actions (T, B, A), is_first (T, B) bool -> posterior states
        and prior logits over (T, B). `state` precedes step 0, if that is not is_first;
        None starts from zeros."""
        assert embeds.shape[:2] == actions.shape[:2] == is_first.shape, "(T, B) differ"
        state = self.initial(embeds.shape[1]) if state is None else state
        states = []
        # The products are small and run T times in turn. In bfloat16 they would need
        # more kernels for casts than for themselves, so they stay in float32.
        with torch.autocast(embeds.device.type, enabled=False):
            for embed, action, first in zip(embeds.float(), actions, is_first):
                state = self.obs_step(state, action, embed, first)
                states.append(state)
        posterior = State(*(torch.stack(x) for x in zip(*states)))
        # A prior depends on its h[t] alone, so all T are computed in one call.
        return posterior, self.prior_logits(posterior.h)


class GaussianRSSM(RSSM):
    """The ablation --no-discrete-latents: z (..., S, K) are S·K Gaussians, so the size
    of a feature is unchanged; the authors use S of them. What State calls logits are
    then means and deviations (..., S, 2K), see gaussian."""

    params_per_class = 2  # its mean and its deviation

    def sample(self, logits: Tensor) -> Tensor:
        """z, (..., S, K), with gradients to means and deviations."""
        return gaussian(logits).rsample()


# %% Part 5 | World model (Eq. 2)
# All that is learned from real experience: the RSSM, an encoder that feeds it, and
# three heads that predict image, reward and discount from its states.
# In: a batch of rows (T, B, ...). Out: a loss, and states where imagination starts.
# Predict: a decoder outputs the exact image. What is its negative log-likelihood?


def normal_nll(mean: Tensor, target: Tensor) -> Tensor:
    """-ln Normal(target; mean, 1) of each element: half the squared error, plus 0.919.
    The constant trains nothing, but with it a perfect image has a loss of 3764:
    >>> image = torch.zeros(1, 64, 64)
    >>> round(normal_nll(image, image).sum().item())
    3764
    """
    return 0.5 * (target - mean) ** 2 + 0.5 * math.log(2 * math.pi)


class WorldModel(nn.Module):
    """Encoder, RSSM, image, reward and discount heads, and their loss. [Eq. 2]"""
    def __init__(self, action_dim: int, channels: int = 1, *, cnn_depth: int = 48,
                 mlp_layers: int = 4, mlp_units: int = 400,
                 discrete_latents: bool = True, symexp_twohot: bool = False,
                 **rssm_sizes: int):
        super().__init__()
        if discrete_latents:
            rssm, self.kl, self.entropy = RSSM, categorical_kl, categorical_entropy
        else:
            rssm, self.kl, self.entropy = GaussianRSSM, gaussian_kl, gaussian_entropy
            rssm_sizes["unimix"] = 0.0  # that is for classes
        self.encoder = ConvEncoder(channels, cnn_depth)
        self.rssm = rssm(action_dim, self.encoder.embed_dim, **rssm_sizes)
        size = self.rssm.feature_size
        self.decoder = ConvDecoder(size, channels, cnn_depth)
        widths = mlp_layers, mlp_units
        self.reward_head = mlp(size, 255 if symexp_twohot else 1, *widths)
        self.discount_head = mlp(size, 1, *widths)

    @staticmethod
    def preprocess(image: Tensor) -> Tensor:
        """uint8 pixels -> float32 in [-½, ½], what encoder and decoder speak."""
        return image.float() / 255 - 0.5

    def predict_reward(self, feature: Tensor) -> Tensor:
        """Mean reward on arriving in a state, (..., F) -> (...). With reward_tanh it is
        the mean of tanh(r), so imagined rewards are bounded alike in every game."""
        return head_mean(self.reward_head(feature))

    def predict_discount(self, feature: Tensor) -> Tensor:
        """Discount of a state, (..., F) -> (...): γ if play goes on, 0 if it ends. γ is
        inside already, by the head's training: nothing multiplies by it again."""
        return self.discount_head(feature).squeeze(-1).sigmoid()

    def loss(self, image: Tensor, action: Tensor, reward: Tensor, is_first: Tensor,
             is_terminal: Tensor, *, gamma: float, kl_scale: float,
             kl_balance: float | None, discount_scale: float, free_nats: float = 0.0,
             free_bits: float = 0.0, reward_tanh: bool = True,
             image_gradients: bool = True, reward_gradients: bool = True):
        """The world-model loss of one batch. [Eq. 2]
            E_q Σ_t [ -ln p(x[t] | h[t], z[t]) - ln p(r[t] | h[t], z[t])
                      -ln p(γ[t] | h[t], z[t]) + β KL(q(z | h[t], x[t]) ‖ p(z | h[t])) ]
        image (T, B, C, 64, 64) uint8, action (T, B, A), reward, is_first, is_terminal
        (T, B) -> loss (scalar), posterior State over (T, B), metrics. Summed over
        pixels and latents, averaged over T and B [D7]. The image has 4096 terms against
        one, and outweighs the rest. The discount's term is weighted by discount_scale
        [D14].
        """
        target = self.preprocess(image)
        posterior, prior = self.rssm.observe(self.encoder(target), action, is_first)
        feature = posterior.feature
        # In two ablations a head trains as before but sends the RSSM no gradient.
        mean = self.decoder(feature if image_gradients else feature.detach())
        assert mean.shape == image.shape, "the decoder must return the encoder's shape"
        image_loss = normal_nll(mean, target).sum((-3, -2, -1)).mean()
        # The tanh tames games that score by the thousand. It lives here and nowhere
        # else: replay keeps raw rewards, and scores are reported raw.
        reward_target = reward.tanh() if reward_tanh else reward
        seen = feature if reward_gradients else feature.detach()
        out = self.reward_head(seen)
        reward_mean, twohot = head_mean(out), out.shape[-1] > 1
        reward_loss = (twohot_nll(out, reward_target) if twohot
                       else normal_nll(reward_mean, reward_target)).mean()
        # A soft target, γ or 0, not 1 or 0: the head's mean then IS the discount, and a
        # truncated episode (not terminal) keeps its γ. A target of 1 in its place would
        # teach a discount of 1, so that returns are not discounted.
        discount_target = gamma * (1 - is_terminal.float())
        logit = self.discount_head(feature).squeeze(-1)
        discount_loss = F.binary_cross_entropy_with_logits(logit, discount_target)
        kl_loss, kl = balanced_kl(
            posterior.logits, prior, kl_balance, self.kl, free_bits)
        kl_loss = kl_loss.mean().clamp(min=free_nats)
        loss = image_loss + reward_loss
        loss = loss + discount_scale * discount_loss + kl_scale * kl_loss
        with torch.no_grad():
            metrics = dict(
                image_loss=image_loss, reward_loss=reward_loss,
                discount_loss=discount_loss, kl=kl.mean(), model_loss=loss,
                image_mse=F.mse_loss(mean, target),
                reward_mse=F.mse_loss(reward_mean, reward_target),
                prior_entropy=self.entropy(prior).sum(-1).mean(),
                posterior_entropy=self.entropy(posterior.logits).sum(-1).mean(),
            )
        return loss, posterior, {k: v.detach() for k, v in metrics.items()}


# %% Part 6 | Imagination
# The actor acts in the world model, from each of the N = T·B states of the batch.
# In: N start states. Out: H + 1 features and the actions that led to them; no images.
# Predict: which action is actions[0]?


def imagine(img_step, actor, start: State, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the world model forward with the actor's sampled actions (paper, Fig. 3).
        z[0] ──────► z[1] ──────► z[2] ── ... ──► z[H]       features[t] = [z[t], h[t]]
            actions[1]   actions[2]                          actions[t] led to state t
    img_step: (State, action) -> State, as RSSM.img_step; actor: features -> a policy
    with rsample(), as OneHot; start: State over (N,), detached -> features (H+1, N, F),
    actions (H+1, N, A). Nothing chose actions[0]: it is zero. Gradients of later states
    can reach the actor through its samples; for Reinforce, torch.no_grad() is around.
    >>> def clock(state, action):                             # a world that only counts
    ...     return State(state.h + 1, state.z, state.logits)
    >>> start = State(torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1, 1))
    >>> actor = lambda feature: OneHot(torch.zeros(2, 3))
    >>> features, actions = imagine(clock, actor, start, horizon=3)
    >>> features[:, 0, 1].tolist()                # feature = [z, h], and h is the clock
    [0.0, 1.0, 2.0, 3.0]
    >>> actions.sum(-1)[:, 0].tolist()            # nothing, then one-hot actions
    [0.0, 1.0, 1.0, 1.0]
    """
    state, features, actions = start, [start.feature], []
    for _ in range(horizon):
        # With ρ < 1 a return's gradient reaches the actor through each sampled action.
        # The detach cuts a second path: an action changes states after it, and those
        # change what the actor chooses there.
        action = actor(features[-1].detach()).rsample()
        state = img_step(state, action)
        features.append(state.feature)
        actions.append(action)
    return torch.stack(features), torch.stack([torch.zeros_like(actions[0])] + actions)


# %% Part 7 | Returns and losses (Eq. 4-6)
# What the imagined sequences are worth, and how the actor and the critic learn from it.
#
#     state        z[0]      z[1]      z[2]   ...   z[H-1]      z[H]
#     reward       r[0]      r[1]      r[2]         r[H-1]      (unused)
#     discount     γ[0]      γ[1]      γ[2]         γ[H-1]      (unused)
#     action            a0        a1        ...            a_{H-1}   a_t: actions[t+1]
#     returns      V[0]      V[1]      V[2]         V[H-1]      V[H] = v(z[H])
#
# r[t] is received on ARRIVING in z[t], so V[t] and v(z[t]) both contain it, and it
# cancels in the advantage V[t] - v(z[t]): a_t is credited only with what follows it.
# A loss has a term for each state but the last [D16]. Their weights w[t] are not in the
# paper's Equations 5 and 6, but in its text.
# In: (H, N) tensors, values (H+1, N). Out: returns (H, N), and scalars to minimise.
# Predict: rewards 1, 2, values 8, 4, 2, discounts ½: the returns with λ = ½?


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor,
                  lambda_: float) -> Tensor:
    """λ-returns: a weighted mean of all n-step returns. [Eq. 4]
        V[t] = r[t] + γ[t] · ((1 - λ) · v(z[t+1]) + λ · V[t+1]),    V[H] = v(z[H])
    value (H+1, N); reward and discount (H, N), or (H+1, N) whose last entry is not used
    -> returns (H, N). r[t] came on ARRIVING in z[t]; γ[t] is 0 if that ended the game.
    It bootstraps from the NEXT value: from v(z[t]), the critic would chase itself.
    >>> r, v = torch.tensor([1.0, 2.0]), torch.tensor([8.0, 4.0, 2.0])
    >>> g = torch.tensor([0.5, 0.5])
    >>> lambda_return(r, v, g, 0.5).tolist()        # 1 + ½·(½·4 + ½·3),  2 + ½·2
    [2.75, 3.0]
    >>> lambda_return(r, v, g, 0.0).tolist()        # one step:   r[t] + γ v[t+1]
    [3.0, 3.0]
    >>> lambda_return(r, v, g, 1.0).tolist()        # all H steps:  1 + ½·3
    [2.5, 3.0]
    """
    assert value.shape[1:] == reward.shape[1:] == discount.shape[1:], "N differs"
    returns, target = [], value[-1]
    for t in reversed(range(len(value) - 1)):
        future = (1 - lambda_) * value[t + 1] + lambda_ * target
        target = reward[t] + discount[t] * future
        returns.append(target)
    return torch.stack(returns[::-1])


def trajectory_weights(discount: Tensor) -> Tensor:
    """How much each imagined state counts: the chance to be there, discounted.
        w[t] = Π_{i < t} γ[i],    w[0] = 1
    discount (H, N) -> weights (H, N), detached, or the actor would learn to move ends.
    After a predicted end weights are near zero, and rightly: the model never learned to
    go on there. The first weight is 1, whatever γ[0] is: we ARE in the start state.
    >>> trajectory_weights(torch.tensor([0.5, 0.5, 0.0, 0.5])).tolist()
    [1.0, 0.5, 0.25, 0.0]
    """
    return torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0).detach()


def critic_loss(value: Tensor, returns: Tensor, weights: Tensor, bins=None):
    """Squared error towards the returns. [Eq. 5]
        mean over t, n of  w[t] · ½ (v(z[t]) - sg(V[t]))²
    value, returns, weights (H, N), t = 0 .. H-1 -> loss (scalar), metrics. [D7] With
    bins (H, N, K), of which value is the mean, DreamerV3's twohot_nll in its place.
    >>> v, V = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    >>> w = torch.tensor([1.0, 0.5])
    >>> critic_loss(v, V, w)[0].item()              # (1·½·4 + ½·½·16) / 2
    3.0
    """
    target = returns.detach()
    error = 0.5 * (value - target) ** 2 if bins is None else twohot_nll(bins, target)
    loss = (weights * error).mean()
    means = dict(value=value.detach().mean(), returns=returns.detach().mean())
    return loss, dict(critic_loss=loss.detach()) | means


def returns_range(returns: Tensor) -> Tensor:
    """P95 - P5, the range of returns without outliers, a scalar. DreamerV3 divides the
    advantage by max(1, S), S its running mean: large returns are scaled down, so that η
    fits all games; small ones, which may be noise, are not scaled up. Here: that 1 is
    return_scale.
    >>> round(returns_range(torch.arange(101.0)).item(), 2)
    90.0
    """
    return returns.quantile(0.95) - returns.quantile(0.05)


def actor_loss(log_prob: Tensor, entropy: Tensor, returns: Tensor, baseline: Tensor,
               weights: Tensor, *, entropy_scale: float, reinforce_mix: float = 1.0,
               return_scale: float = 1.0):
    """Reinforce, dynamics backpropagation and entropy. [Eq. 6]
        mean over t, n of  w[t] · ( - ρ · ln p(a_t | z[t]) · sg(V[t] - v(z[t]))
                                    - (1 - ρ) · V[t]
                                    - η · entropy(p(· | z[t])) )
    log_prob (H, N): ln p of a_t, the action CHOSEN in state t: imagine's actions[t+1],
    detached; entropy (H, N) of the policy there; returns, baseline, weights (H, N) ->
    loss (scalar), metrics. For ρ < 1, returns carry the actor's gradient. Subtracting
    v(z[t]), which knows nothing of a_t, keeps the mean gradient, at far less variance.
    >>> logits = torch.zeros(1, 2).requires_grad_()              # two equal actions
    >>> log_prob, ent = logits.log_softmax(-1)[:, 0], torch.zeros(1)  # chose the first
    >>> V, v, w = torch.tensor([3.0]), torch.tensor([1.0]), torch.ones(1)
    >>> loss, _ = actor_loss(log_prob, ent, V, v, w, entropy_scale=0.0)
    >>> round(loss.item(), 4)                                    # ln 2 · (3 - 1)
    1.3863
    >>> loss.backward(); logits.grad.tolist()    # descent: good gets likelier
    [[-1.0, 1.0]]
    """
    # The advantage only weighs ln p. With ρ < 1 the returns carry a gradient, which
    # without the detach would also flow through this product.
    advantage = (returns - baseline).detach() / return_scale
    objective = (
        reinforce_mix * log_prob * advantage
        + (1 - reinforce_mix) * returns
        + entropy_scale * entropy
    )
    loss = -(weights * objective).mean()
    return loss, dict(actor_loss=loss.detach(), actor_entropy=entropy.detach().mean())


# %% Part 8 | Agent (Eq. 3)
# The actor a_t ~ p(a_t | z_t) and the critic v(z_t) ≈ E Σ_{τ≥t} γ^{τ-t} r_τ [Eq. 3], on
# the full model state [z, h], and one gradient step of everything, on one screen.
# In: a batch of rows (T, B, ...). Out: weights that moved, and metrics.
# Predict: Adam's first step moves all weights by nearly the same amount. How far?


def fields(source, names: str) -> dict:
    """The named settings, to pass on as keywords."""
    return {name: getattr(source, name) for name in names.split()}


class Optimizer:
    """Adam with global-norm clipping and decoupled decay, for the weights of a module.
    Authors' code: clip the gradient, then w <- (1 - decay)·w, NOT times the learning
    rate, then Adam. AdamW decays by lr·weight_decay, hence the division. Autograd does
    not see a fused step: after it, no older loss may be differentiated.
    >>> layer = nn.Linear(1, 1)
    >>> _ = nn.init.ones_(layer.weight)
    >>> opt = Optimizer(layer, lr=0.5, eps=0.0, clip=100.0, decay=0.25)
    >>> round(opt.minimize(3 * layer(torch.ones(1)).sum()).item(), 4)   # 3√2
    4.2426
    >>> round(layer.weight.item(), 4)           # ¾·1, then Adam's first step, lr
    0.25
    """
    def __init__(self, module, *, lr: float, eps: float, clip: float, decay: float):
        self.weights, self.clip = list(module.parameters()), clip
        self.adam = torch.optim.AdamW(
            self.weights, lr, eps=eps, weight_decay=decay / lr, fused=True,
            capturable=self.weights[0].is_cuda)  # its step count in the CUDA graph too

    def minimize(self, loss: Tensor) -> Tensor:
        """Minimise `loss` by one step; returns the gradient's norm before clipping."""
        self.adam.zero_grad()
        # A loss's graph reaches other networks, too. inputs= limits the gradients to
        # this optimiser's weights, so each of the three learners moves only its own.
        loss.backward(inputs=self.weights)
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.adam.step()
        return norm


class CudaGraph:
    """Records what a function does on the GPU once, then replays it as a whole.

    A gradient step is thousands of small kernels, and Python launches them more slowly
    than the GPU runs them; a recorded graph is launched at once. `function` takes and
    returns a dict of tensors and must not need a CPU-GPU synchronisation. Each set of
    options and shapes has its graph, all in one pool of memory: three calls run
    plainly, so that libraries choose their kernels and Adam allocates its state, and
    the fourth records. If you hold a loss of your own on the agent's weights, delete it
    before the fourth call: its autograd graph would break the recording. Inputs are
    copied in, outputs out, random numbers are new. The gain is not measured yet."""

    def __init__(self, function):
        self.function, self.stream = function, torch.cuda.Stream()
        self.calls, self.graphs, self.pool = {}, {}, torch.cuda.graph_pool_handle()

    def __call__(self, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
        key = (*options.items(), *((k, v.shape) for k, v in inputs.items()))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(inputs, **options)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            fixed = {name: value.clone() for name, value in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.graphs[key] = graph, fixed, self.function(fixed, **options)
        graph, fixed, outputs = self.graphs[key]
        for name, value in inputs.items():
            fixed[name].copy_(value)
        graph.replay()
        return {name: value.clone() for name, value in outputs.items()}


class Agent(nn.Module):
    """World model, actor, critic, slow critic, and their three optimisers."""

    def __init__(self, config: Config, num_actions: int, channels: int = 1,
                 device: torch.device | str = "cpu", continuous: bool = False):
        super().__init__()
        c, self.num_actions, self.updates = config, num_actions, 0
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        auto = "bf16" if on_gpu and torch.cuda.is_bf16_supported(False) else "fp32"
        self.precision = auto if c.precision == "auto" else c.precision
        self.world_model = WorldModel(num_actions, channels, **fields(
            c, """num_latents num_classes deter_size hidden_size cnn_depth mlp_layers
            mlp_units layer_norm discrete_latents symexp_twohot unimix"""))
        size, widths = self.world_model.rssm.feature_size, (c.mlp_layers, c.mlp_units)
        self.distribution = TruncatedNormal if continuous else OneHot
        self.actor = mlp(size, num_actions * (2 if continuous else 1), *widths)
        self.critic = mlp(size, 255 if c.symexp_twohot else 1, *widths)
        self.apply(glorot_init)
        if c.symexp_twohot:  # at first they predict 0
            nn.init.zeros_(self.critic[-2].weight)
            nn.init.zeros_(self.world_model.reward_head[-2].weight)
        # S of returns_range; saved only where it is used.
        self.register_buffer("spread", torch.zeros(()), persistent=c.return_scale > 0)
        self.unimix = 0.0 if continuous else c.unimix
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # Channels last: same numbers, faster. MPS may read such weights wrongly.
        on_mps = self.device.type == "mps"
        order = torch.contiguous_format if on_mps else torch.channels_last
        self.to(self.device, memory_format=order)
        self.model_loss_args = fields(c, """gamma kl_scale kl_balance free_nats
            free_bits discount_scale reward_tanh reward_gradients image_gradients""")
        self.model_loss_args["kl_balance"] = c.kl_balance if c.kl_balancing else None
        if not c.discount_head:
            self.model_loss_args["discount_scale"] = 0.0
        # Paper: continuous actions learn by dynamics alone; so does the ablation.
        reinforce = c.policy_reinforce and not continuous
        self.mix = (c.reinforce_mix, c.reinforce_mix_end) if reinforce else (0.0, 0.0)
        self.entropy = (c.entropy_scale, c.entropy_scale_end)
        self.reinforce_mix, self.entropy_scale = torch.zeros(2, 1, device=self.device)
        names = """horizon gamma return_lambda discount_head slow_baseline return_scale
            shifted_advantage slow_every_updates anneal_steps"""
        for name, value in fields(c, names).items():
            setattr(self, name, value)
        shared = dict(eps=c.adam_eps, clip=c.grad_clip, decay=c.weight_decay)
        learners = dict(model=self.world_model, actor=self.actor, critic=self.critic)
        self.optimizers = {name: Optimizer(net, lr=getattr(c, f"{name}_lr"), **shared)
                           for name, net in learners.items()}
        if c.cuda_graphs and on_gpu:
            self.update_networks = CudaGraph(self.update_networks)
            self.decide = CudaGraph(self.decide)

    def autocast(self):
        """In bf16, layers multiply in bfloat16, but for those of observe; weights, h,
        logits and losses stay float32. Inside one `with` a weight is cast once and the
        copy reused. So no optimiser may step there, or the copy is stale, and no layer
        may run without gradients and later with them, or the copy has none."""
        on = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def policy(self, feature: Tensor):
        """p(a_t | z_t) of states (..., F), with rsample, mode, log_prob, entropy."""
        return self.distribution(unimix(self.actor(feature), self.unimix))

    @torch.no_grad()
    def act(self, image: Tensor, is_first: Tensor, memory=None, greedy: bool = False):
        """One decision for N environments: image (N, C, 64, 64) uint8, is_first (N,)
        bool and the memory of the call before (None at first) -> action (N, A), memory.
        greedy takes the policy's mode, for evaluation; z is sampled all the same."""
        if memory is None:
            h, z, _ = self.world_model.rssm.initial(len(image))
            memory = dict(h=h, z=z, action=h.new_zeros(len(image), self.num_actions))
        seen = memory | dict(image=image, is_first=is_first)
        memory = self.decide(seen, greedy=greedy)
        return memory["action"], memory

    def decide(self, seen: dict[str, Tensor], *, greedy: bool) -> dict[str, Tensor]:
        """act, from one dict of tensors to another: what a CUDA graph can hold."""
        model = self.world_model
        before = State(seen["h"], seen["z"], logits=None)
        with self.autocast():
            embed = model.encoder(model.preprocess(seen["image"]))
            state = model.rssm.obs_step(before, seen["action"], embed, seen["is_first"])
            policy = self.policy(state.feature)
        action = policy.mode if greedy else policy.rsample()
        return dict(h=state.h, z=state.z, action=action)

    def schedule(self, step: int) -> tuple[float, float]:
        """ρ and η after so many decisions: each moves in a straight line to its end."""
        done = min(1.0, step / self.anneal_steps) if self.anneal_steps else 0.0
        return tuple(a + done * (b - a) for a, b in (self.mix, self.entropy))

    def train_step(self, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """One gradient step: the rows of Replay.sample (T, B, ...) -> metrics, scalars
        on the device. `step`, decisions so far, anneals ρ and η. After the 1st, 101st,
        201st ... (slow_every_updates) the slow critic becomes a copy: without it, the
        critic would chase its own latest guess."""
        mix, entropy = self.schedule(step)
        self.reinforce_mix.fill_(mix)  # in place: a CUDA graph reads it where it is
        self.entropy_scale.fill_(entropy)
        metrics = self.update_networks(batch, dynamics=mix < 1)  # a graph on a GPU
        if self.updates % self.slow_every_updates == 0:
            self.slow_critic.load_state_dict(self.critic.state_dict())  # in place
        self.updates += 1
        return metrics

    def update_networks(self, batch: dict[str, Tensor], *, dynamics: bool):
        """World model, actor and critic learn from one batch: the whole algorithm."""
        # 1. World model: learn to predict what happened. [Eq. 2]
        with self.autocast():
            loss, posterior, metrics = self.world_model.loss(
                **batch, **self.model_loss_args)
        metrics["model_grad_norm"] = self.optimizers["model"].minimize(loss)

        # 2. Imagine H steps from every posterior state, with the model just updated.
        #    The detach cuts the graph at the start states; only ρ < 1 needs gradients.
        start = State(*(x.detach().flatten(0, 1) for x in posterior))  # (T, B) -> (N,)
        with self.autocast(), torch.set_grad_enabled(dynamics):
            features, actions = imagine(  # (H+1, N, F), (H+1, N, A)
                self.world_model.rssm.img_step, self.policy, start, self.horizon)
            reward = self.world_model.predict_reward(features[:-1])  # r[0]: see Part 7
            discount = self.world_model.predict_discount(features[1:-1])
            # The start state is a real one, so whether it was terminal is known [D13].
            # Without this a terminal state's return would count rewards imagined after.
            true_discount = self.gamma * (1 - batch["is_terminal"].flatten().float())
            discount = torch.cat([true_discount[None], discount])
            if not self.discount_head:  # every discount is γ, even after an end
                discount = torch.full_like(discount, self.gamma)
            slow_value = head_mean(self.slow_critic(features))
            returns = lambda_return(reward, slow_value, discount, self.return_lambda)
            weights = trajectory_weights(discount)

        # 3. Critic: predict the returns. [Eq. 5]  State H only bootstraps.
        shift = int(self.shifted_advantage)  # [D5]
        states, end = features[:-1].detach(), self.horizon - shift
        with self.autocast():  # the policy runs again, for the gradient of ln p
            out, policy = self.critic(states), self.policy(states[:end])
        value, bins = head_mean(out), out if out.shape[-1] > 1 else None
        loss_of_critic, critic_metrics = critic_loss(value, returns, weights, bins)

        # 4. Actor: make good returns likelier. [Eq. 6]  actions[t+1] was chosen in
        #    state t; in ln p it is a constant, though with ρ < 1 it carries a gradient.
        #    shift = 1 (--shifted-advantage) credits it with V[t+1] [D5].
        baseline = slow_value[:-1] if self.slow_baseline else value
        scale = 1.0
        if self.return_scale:  # in place, for CUDA graphs and checkpoints
            self.spread.lerp_(returns_range(returns.detach()), 0.01)
            scale = self.spread.clamp(min=self.return_scale)
        log_prob = policy.log_prob(actions[1:end + 1].detach())
        loss_of_actor, actor_metrics = actor_loss(
            log_prob, policy.entropy(), returns[shift:], baseline[:end],
            weights[:end], entropy_scale=self.entropy_scale,
            reinforce_mix=self.reinforce_mix, return_scale=scale)
        metrics |= critic_metrics | actor_metrics
        metrics["actor_grad_norm"] = self.optimizers["actor"].minimize(loss_of_actor)
        metrics["critic_grad_norm"] = self.optimizers["critic"].minimize(loss_of_critic)
        return metrics


# %% Part 9 | Replay
# The last 2M rows that were played, on disk. The learner reads 2500 rows for every four
# that are played, so over a run each row is used some 600 times.
# In: one row of N environments at a time. Out: batches of sequences (T, B, ...).
# Predict: seven rows are stored, the ring holds four: which sequences of 3 are there?


class UsageError(Exception):
    """An error that the user can mend. It ends the program with one line and exit
    status 2, or 1 once training began."""


class Row(NamedTuple):
    """One moment of N environments: the action LED to the image, and the reward came
    with it; on an episode's first row both are zero. is_terminal: the game ended. It is
    False where a time limit cut the episode: there γ is kept."""

    image: np.ndarray  # (N, C, 64, 64) uint8
    action: np.ndarray  # (N, A) float32, one-hot or in [-1, 1]
    reward: np.ndarray  # (N,) float32, raw
    is_first: np.ndarray  # (N,) bool
    is_terminal: np.ndarray  # (N,) bool


class Replay:
    """A ring of rows for each environment, in a memory-mapped .npy file.

    `capacity` counts rows over all environments. The oldest row is overwritten first,
    one by one (FIFO), not episode by episode. Opening a directory that holds a replay
    of the same layout goes on with it; another layout raises UsageError.
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> replay = Replay(folder.name, capacity=4, image_shape=(1, 1, 1), action_dim=2)
    >>> for t in range(7):
    ...     replay.add(np.zeros((1, 1, 1, 1)), np.zeros((1, 2)), [t], [False], [False])
    >>> rewards = replay.sample(batch_size=100, seq_len=3)["reward"]         # (T, B)
    >>> sorted(set(map(tuple, rewards.T.tolist())))   # of rows 0 to 6 four are left
    [(3.0, 4.0, 5.0), (4.0, 5.0, 6.0)]
    """

    def __init__(self, directory, capacity: int, *, num_envs: int = 1,
                 image_shape=(1, 64, 64), action_dim: int = 18, seed: int = 0):
        dtype = np.dtype([
            ("image", np.uint8, image_shape), ("action", np.float32, (action_dim,)),
            ("reward", np.float32), ("is_first", bool), ("is_terminal", bool)])
        self.num_envs, self.length = num_envs, capacity // num_envs
        # The spare slot holds the row being written, which a kill may tear.
        self.slots = self.length + 1
        self.random = np.random.default_rng(seed)
        rows, written = Path(directory, "rows.npy"), Path(directory, "written.npy")
        try:
            if not rows.exists():  # made last: where it exists, both are whole
                rows.parent.mkdir(parents=True, exist_ok=True)
                np.save(written, np.zeros(1, np.int64))
                make_file(rows, dtype, (num_envs, self.slots))
            for mode in ("r", "r+"):  # "r" refuses a shortened file, "r+" would fill it
                self.rows, self.written = np.load(rows, mode), np.load(written, mode)
        except Exception as error:  # numpy raises many kinds
            what = f"{directory} cannot be made or is damaged"
            raise UsageError(f"{what}: {error}") from None
        if (self.rows.dtype, self.rows.shape) != (dtype, (num_envs, self.slots)):
            raise UsageError(f"{directory} holds other rows: choose another --logdir")

    def __len__(self) -> int:
        """Rows that can be sampled, over all environments."""
        return min(int(self.written[0]), self.length) * self.num_envs

    def add(self, image, action, reward, is_first, is_terminal) -> None:
        """Store one row of every environment: the fields of Row, in their shapes."""
        slot = int(self.written[0]) % self.slots
        for k, v in zip(Row._fields, (image, action, reward, is_first, is_terminal)):
            self.rows[k][:, slot] = v
        self.written[0] += 1  # last: a row counts once it is whole

    def sample(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """Uniformly drawn sequences: a dict of Row's fields, time-major (T, B, ...).
        A full ring goes on from the newest row, over the spare slot, to the oldest. So
        starts are drawn in the order of age, and only then turned into slots: a
        sequence may go on into the next episode [D8], never from newest to oldest."""
        written = int(self.written[0])
        oldest = max(0, written - self.length)
        if written - oldest < seq_len:
            raise UsageError(f"{written - oldest} rows stored, {seq_len} in a sequence")
        start = self.random.integers(oldest, written - seq_len + 1, batch_size)
        env = self.random.integers(self.num_envs, size=batch_size)
        slots = (start + np.arange(seq_len)[:, None]) % self.slots  # (T, B)
        batch = {name: torch.from_numpy(np.asarray(self.rows[name])[env, slots])
                 for name in Row._fields}  # env (B,) broadcasts against slots (T, B)
        # The state before row 0 is unknown, so row 0 is treated as an episode's first.
        # Without this line its action would act on a state it was not chosen in.
        batch["is_first"][0] = True
        return batch


def make_file(path: Path, dtype: np.dtype, shape: tuple) -> None:
    """An array of zeros on disk, made under another name and renamed last, so that a
    kill leaves no half of it; where there is no room for it, nothing stays."""
    new = path.with_suffix(".new")
    try:
        np.lib.format.open_memmap(new, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # else a disk that fills up kills by SIGBUS
            with open(new, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# %% Part 10 | Environments
# All that can be played, as rows: ale-py's C++ emulators, any Gymnasium game with
# images, and Catch, an example to copy. In: actions (N, A). Out: rows.
# Predict: with which step of Catch does the ball land?


class Catch(gymnasium.Env):
    """A ball falls through an 8×8 board, a paddle catches it: learned in minutes.

    An example to copy, too: any gymnasium.Env with images that is registered under an
    id is played by `--game your_module:YourGame-v0`.
    Actions: left, stay, right. Reward when the ball lands: +1 caught, -1 missed.
    >>> env = Catch()
    >>> _ = env.reset(seed=0)
    >>> [env.step(1)[2] for _ in range(7)]    # it lands with the 7th step
    [False, False, False, False, False, False, True]
    """

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 1), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        """A new ball in a random column; the paddle starts in the middle."""
        super().reset(seed=seed)
        self.ball, self.row, self.paddle = int(self.np_random.integers(8)), 0, 4
        return self.board(), {}

    def step(self, action):
        """Move the paddle, let the ball fall by one cell."""
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 7)
        self.row += 1
        landed, caught = self.row == 7, self.ball == self.paddle
        reward = (1.0 if caught else -1.0) if landed else 0.0
        return self.board(), reward, landed, False, {}

    def board(self):
        """The board as an image: 8×8 pixels a cell."""
        cells = np.zeros((8, 8, 1), np.uint8)
        cells[self.row, self.ball] = cells[7, self.paddle] = 255
        return cells.repeat(8, axis=0).repeat(8, axis=1)


def to_image(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W), uint8 or in [0, 1] -> (C, 64, 64) uint8, resized
    by area; ValueError for anything else. A last axis of 1 to 4 is channels."""
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and image.shape[-1] <= 4:
        image = np.moveaxis(image, -1, 0)
    if image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1:
        image = (255 * image).round().astype(np.uint8)
    if image.ndim != 3 or len(image) > 4 or image.dtype != np.uint8:
        raise ValueError("images must be (H, W), (H, W, C) or (C, H, W), C <= 4, uint8"
                         f" or in [0, 1], not {image.dtype} of shape {image.shape}")
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    return F.interpolate(pixels[None], (64, 64), mode="area")[0].round().byte().numpy()


def plain_game(env: gymnasium.Env, action_repeat: int, time_limit: int):
    """A Gymnasium game as Envs plays it: images (C, 64, 64) uint8, actions from 0 or in
    [-1, 1], rewards as numbers. ValueError names what does not fit."""
    Box, Discrete = gymnasium.spaces.Box, gymnasium.spaces.Discrete
    actions, wrap = env.action_space, gymnasium.wrappers
    images = Box(0, 255, to_image(env.observation_space.sample()).shape, np.uint8)
    env = wrap.TransformObservation(env, to_image, images)
    env = wrap.TransformReward(env, lambda reward: np.asarray(reward).item())
    if isinstance(actions, Discrete):
        start, plain = int(actions.start), Discrete(int(actions.n))
        env = wrap.TransformAction(env, lambda x: x + start, plain)
    elif isinstance(actions, Box) and len(actions.shape) == 1 and (
            actions.dtype.kind == "f" and actions.is_bounded()):
        low, high, dtype = actions.low, actions.high, actions.dtype

        def rescale(x):  # clipped, since rounding may leave the box by the last digit
            return (low + (x + 1) / 2 * (high - low)).clip(low, high).astype(dtype)

        env = wrap.TransformAction(env, rescale, Box(-1, 1, low.shape, np.float32))
        env = wrap.RepeatAction(env, action_repeat)
    else:
        raise ValueError("actions must be Discrete, or a bounded Box of one axis of"
                         f" floats, not {actions}")
    return wrap.TimeLimit(env, time_limit)


@contextlib.contextmanager
def blame(game: str):
    """Whatever a game raises becomes one line that names the game."""
    try:
        yield
    except (Exception, SystemExit) as error:
        what = f"--game {game}: {type(error).__name__}: {error}"
        if isinstance(error, gymnasium.error.UnregisteredEnv):
            what += " (the id of a package's game is module:id, as in minigrid:...)"
        raise UsageError(" ".join(what.split())) from error


class Envs:
    """N copies of a game as rows, from a gymnasium vector environment that resets in
    the step AFTER an episode's end (NEXT_STEP, the default): that step ignores the
    action and returns the next episode's first image, a row with is_first, which is no
    decision. `done` says whose episode ended with the last row, `ended` what it
    brought, as (raw score, decisions)."""

    def __init__(self, vector_env, game: str, seed: int, action_repeat: int):
        actions = vector_env.single_action_space
        self.continuous = isinstance(actions, gymnasium.spaces.Box)
        self.num_actions = int(actions.shape[0] if self.continuous else actions.n)
        self.channels = vector_env.single_observation_space.shape[0]
        self.vector_env, self.num_envs = vector_env, vector_env.num_envs
        self.game, self.seed, self.frames_per_step = game, seed, action_repeat

    def close(self) -> None:
        """End the games. If one cannot, since its process is dead, it has ended."""
        with contextlib.suppress(Exception):
            self.vector_env.close()

    def reset(self) -> Row:
        """The first row of N new episodes, from self.seed."""
        with blame(self.game):
            images, _ = self.vector_env.reset(seed=self.seed)
        self.vector_env.action_space.seed(self.seed)
        self.done, self.ended = np.zeros(self.num_envs, bool), []
        self.totals = np.zeros((self.num_envs, 2))  # score and decisions so far
        action = np.zeros((self.num_envs, self.num_actions), np.float32)
        reward = np.zeros(self.num_envs, np.float32)
        return Row(images, action, reward, ~self.done, self.done)

    def step(self, action: np.ndarray) -> Row:
        """Play actions (N, A), one-hot or in [-1, 1]: the row that they led to."""
        action = np.asarray(action, np.float32)
        # An action out of range hangs ale-py, Ctrl-C included; this width rules it out.
        expected = (self.num_envs, self.num_actions)
        assert action.shape == expected, "actions must be (N, A)"
        chosen = action if self.continuous else action.argmax(-1)
        with blame(self.game):
            images, reward, terminated, truncated, _ = self.vector_env.step(chosen)
            reward = reward.astype(np.float32)  # which holds numbers up to 3e38
            if not np.isfinite(reward).all():
                raise ValueError("a reward that is not finite")
        is_first, self.done = self.done, terminated | truncated
        # Without `played`, a first row would claim that the ignored action led to it.
        played = (~is_first).astype(np.float32)
        action, reward = action * played[:, None], reward * played
        self.totals += np.stack([reward, played], -1)
        self.ended = self.totals[self.done].tolist()
        self.totals[self.done] = 0
        return Row(images, action, reward, is_first, terminated)


def atari_roms() -> dict[str, str]:
    """The Atari games, by their names without underscores. Left out are four for two
    players, on which ale-py's vector environment aborts the whole process."""
    from ale_py.roms import get_all_rom_ids  # here: the algorithm needs no emulator

    roms = set(get_all_rom_ids()) - {"combat", "joust", "maze_craze", "warlords"}
    return {rom.replace("_", ""): rom for rom in sorted(roms)}


def canonical_name(game: str) -> str:
    """One name for all spellings of an Atari game, and of Catch; other ids stay.
    >>> [canonical_name(x) for x in ("UpNDown", "ALE/UpNDown-v5", "catch", "my:Up-v0")]
    ['up_n_down', 'up_n_down', 'Catch', 'my:Up-v0']
    """
    if game.lower() == "catch":
        return "Catch"
    name = re.sub(r"^ale/|(noframeskip|deterministic)?-v[045]$", "", game.lower())
    return atari_roms().get(re.sub(r"[ _-]", "", name), game)


def make_envs(game: str, num_envs: int = 1, seed: int = 0, *, action_repeat: int = 4,
              sticky: float = 0.25, max_noops: int = 29, time_limit: int = 27_000,
              full_action_space: bool = True) -> Envs:
    """N environments of a game, by any of its names; UsageError says what is wrong.
    Actions are repeated on Atari and where they are continuous, as in the paper.
    >>> make_envs("Catch", num_envs=2).reset().image.shape
    (2, 1, 64, 64)
    """
    name = canonical_name(game)
    if name != "Catch" and name in atari_roms().values():
        from ale_py.vector_env import AtariVectorEnv

        # Gray, resized by area, the maximum of the last two frames (consoles drew some
        # sprites in every other one). No frame stack, because the RSSM remembers.
        with blame(game):
            return Envs(AtariVectorEnv(
                name, num_envs, img_height=64, img_width=64, stack_num=1,
                frameskip=action_repeat, noop_max=max_noops + 1,  # of 0 to noop_max - 1
                repeat_action_probability=sticky, full_action_space=full_action_space,
                max_num_frames_per_episode=time_limit * action_repeat,
                reward_clipping=False, use_fire_reset=False), game, seed, action_repeat)

    with blame(game), contextlib.ExitStack() as made:  # if one fails, all are closed

        def make_one() -> gymnasium.Env:
            env = Catch() if name == "Catch" else gymnasium.make(game)
            made.callback(env.close)
            return plain_game(env, action_repeat, time_limit)

        vector_env = gymnasium.vector.SyncVectorEnv([make_one] * num_envs)
        made.pop_all()  # all were made: none is closed here
    boxed = isinstance(vector_env.single_action_space, gymnasium.spaces.Box)
    return Envs(vector_env, game, seed, action_repeat if boxed else 1)


def upload(arrays: dict, device: torch.device) -> dict[str, Tensor]:
    """numpy arrays or tensors, as tensors on the device."""
    return {name: torch.as_tensor(x).to(device) for name, x in arrays.items()}


def choose(agent: Agent | None, envs: Envs, row: Row, memory, greedy: bool = False):
    """What to do after a row, at random if agent is None: actions (N, A), memory."""
    if agent is None:
        action = envs.vector_env.action_space.sample()
        return action if envs.continuous else np.eye(envs.num_actions)[action], None
    seen = upload(dict(image=row.image, is_first=row.is_first), agent.device)
    action, memory = agent.act(**seen, memory=memory, greedy=greedy)
    return action.cpu().numpy(), memory  # waits for the GPU


def evaluate(agent: Agent, envs: Envs, episodes: int) -> np.ndarray:
    """Raw score and decisions (episodes, 2) of whole episodes, by the actor's mode."""
    row, memory, ended = envs.reset(), None, []
    while len(ended) < episodes:
        action, memory = choose(agent, envs, row, memory, greedy=True)
        row = envs.step(action)
        ended += envs.ended
    return np.array(ended[:episodes])


# %% Part 11 | Looking
# What a run shows of itself: the numbers of every log period, and pictures of what its
# model predicts. In: scalars, scores, rows. Out: metrics.jsonl, TensorBoard, PNGs.
# Predict: two gradient steps, an entropy of 1, then of 4: what does the line say?


class Metrics:
    """Averages what is added over a log period, and appends one JSON object a line to
    metrics.jsonl; TensorBoard, where installed, gets the same. The first line's rates
    include the prefill. `totals` are running counts, at least step, updates and frames.
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> metrics = Metrics(folder.name, step=0, updates=0, frames=0)
    >>> for entropy in 1.0, 4.0: metrics.add(dict(actor_entropy=torch.tensor(entropy)))
    >>> metrics.write(step=8, updates=2, frames=32)["actor_entropy"]
    2.5
    """

    def __init__(self, folder, **totals):
        self.path, self.before = Path(folder, "metrics.jsonl"), totals
        self.began, self.sums, self.count, self.episodes = time.time(), 0, 0, []
        try:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what was logged after the checkpoint that is resumed.
            self.board = SummaryWriter(folder, purge_step=totals["step"] + 1)
        except Exception:  # not installed, or broken
            self.board = None

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Sum on the device. FloatingPointError names those that are not finite;
        looking for them makes the CPU wait for the GPU, once a gradient step."""
        values = torch.stack([v.float() for v in metrics.values()])
        self.names, self.count = list(metrics), self.count + 1
        self.sums = self.sums + values
        if not values.isfinite().all():
            bad = ", ".join(k for k, v in metrics.items() if not v.isfinite())
            raise FloatingPointError(f"not finite: {bad}")

    def write(self, **totals) -> dict:
        """Append totals, and rates and means since the last line (null: no episode)."""
        seconds, line = max(time.time() - self.began, 1e-9), dict(totals)
        for name in ("updates", "frames"):
            line[f"{name}_per_s"] = (totals[name] - self.before[name]) / seconds
        means = np.mean(self.episodes, 0).tolist() if self.episodes else (None, None)
        line |= dict(zip(("episode_return", "episode_length"), means))
        if self.count:  # 0: no gradient step since the last line
            line |= dict(zip(self.names, (self.sums / self.count).tolist()))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if value is not None:
                    self.board.add_scalar(name, value, totals["step"])
            self.board.flush()
        self.before, self.began = totals, time.time()
        self.sums, self.count, self.episodes = 0, 0, []
        return line


def to_png(frames: np.ndarray, milliseconds: int = 100) -> bytes:
    """Frames (T, H, W, 1 or 3) uint8 -> an animated PNG (w3.org/TR/png-3).
    Pixels are enlarged to whole squares, so that the picture is about 800 wide."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    scale = max(1, 800 // frames.shape[2])
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    count, height, width, channels = frames.shape
    sizes = (width, height, 8, channels - 1, 0, 0, 0)  # 8 bits of gray (0) or RGB (2)
    chunks = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", *sizes))]
    chunks.append(chunk(b"acTL", struct.pack(">II", count, 0)))
    for i, frame in enumerate(frames):
        # Filter 2, named at the head of each line of pixels, stores the difference to
        # the line above: zeros, where pixels are enlarged.
        lines = np.diff(frame.reshape(height, -1), axis=0, prepend=np.uint8(0))
        data = zlib.compress(np.insert(lines, 0, 2, axis=1).tobytes())
        timing = (max(0, 2 * i - 1), width, height, 0, 0, milliseconds, 1000, 0, 0)
        chunks.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", *timing)))
        number = struct.pack(">I", 2 * i) if i else b""  # fcTL, fdAT share one count
        chunks.append(chunk(b"fdAT" if i else b"IDAT", number + data))
    return b"".join(chunks) + chunk(b"IEND", b"")


def to_pixels(image: Tensor) -> np.ndarray:
    """Images in [-½, ½], (..., C, 64, 64) -> (..., 64, 64, 1 or 3) uint8, of 17 levels,
    to keep files small. The last row and column turn gray, to tell neighbours apart."""
    shown = image[..., :3 if image.shape[-3] >= 3 else 1, :, :]
    pixels = ((shown.movedim(-3, -1) + 0.5).clamp(0, 1) * 16).round() * 255 / 16
    pixels[..., -1, :, :] = pixels[..., :, -1, :] = 128
    return pixels.byte().cpu().numpy()


@torch.no_grad()
def open_loop(agent: Agent, batch: dict[str, Tensor], context: int = 5) -> Tensor:
    """Open-loop prediction: truth, model and error (3, T, B, C, 64, 64) in [-½, ½]. The
    model sees the first `context` images of rows (T, B, ...), then only the actions and
    where episodes start. The error is (model - truth) / 2, gray where there is none."""
    model, action, first = agent.world_model, batch["action"], batch["is_first"]
    truth = model.preprocess(batch["image"])
    states, _ = model.rssm.observe(
        model.encoder(truth[:context]), action[:context], first[:context])
    state, features = State(*(x[-1] for x in states)), [*states.feature]
    for t in range(context, len(truth)):
        state = model.rssm.img_step(*model.rssm.restart(state, action[t], first[t]))
        features.append(state.feature)
    guess = model.decoder(torch.stack(features)).clamp(-0.5, 0.5)
    return torch.stack([truth, guess, (guess - truth) / 2])


def draw_dream(agent: Agent, envs: Envs, sequences: int = 12) -> np.ndarray:
    """open_loop as frames (T, 3·64, 4·64, 1 or 3), truth above model above error. Plays
    so many sequences of 50 rows and takes the 4 in which most changes, side by side. A
    white line on top says that the model still sees."""
    row, memory, rows = envs.reset(), None, []
    for _ in range(50 * sequences):
        rows.append(row)
        action, memory = choose(agent, envs, row, memory)
        row = envs.step(action)
    columns = (np.concatenate(values) for values in zip(*rows))  # (50·sequences, ...)
    batch = {name: x.reshape(sequences, 50, *x.shape[1:]).swapaxes(0, 1)
             for name, x in zip(Row._fields, columns)}
    change = np.abs(np.diff(batch["image"].astype(int), axis=0)).mean((0, 2, 3, 4))
    batch = {name: x[:, change.argsort()[-4:]] for name, x in batch.items()}
    batch["is_first"][0] = True
    # (kind, T, B, row, column, C): kinds come one above the other, B side by side.
    pixels = to_pixels(open_loop(agent, upload(batch, agent.device), context=5))
    film = pixels.transpose(1, 0, 3, 2, 4, 5).reshape(50, 3 * 64, 4 * 64, -1)
    film[:5, :2] = 255
    return film


@torch.no_grad()
def draw_play(agent: Agent, envs: Envs) -> np.ndarray:
    """The last 200 of the first 600 steps of play as frames (200, 64, 2·64, 1 or 3): on
    the left what the agent sees, on the right its state (h, z), decoded."""
    row, memory, images, features = envs.reset(), None, [], []
    for _ in range(600):
        action, memory = choose(agent, envs, row, memory, greedy=True)
        images.append(row.image)
        features.append(State(memory["h"], memory["z"], logits=None).feature)
        row = envs.step(action)
    seen = agent.world_model.preprocess(torch.from_numpy(np.concatenate(images[-200:])))
    says = agent.world_model.decoder(torch.cat(features[-200:]))
    return np.concatenate([to_pixels(seen), to_pixels(says)], axis=2)


# %% Part 12 | Running
# training_loop is the whole run, in the order of the header's THE LOOP; around it are
# the command line and what keeps a run safe. A kill at any moment leaves in its folder
#     checkpoint.pt, previous.pt   at least one that is whole: a new one is renamed last
#     replay/                      whole rows: one counts only after it is written
#     metrics.jsonl                lines that resuming cuts back to the checkpoint's
# In: flags. Out: a run's folder, and an exit status.
# Predict: which flag sets Config.kl_balance?

START = dict(step=0, frames=0, updates=0, episodes=0, wall_time_s=0.0)  # a run's totals
TRAIN, EVALUATE, SHOW = range(3)  # what a game is made for, part of its seed
RANDOM = dict(cpu=torch, cuda=torch.cuda, mps=torch.mps)  # each has an rng_state
WHY_ATARI = "the paper's, for a CUDA GPU; --preset small is for a CPU"
WHY_SMALL = ("for a CPU, where Catch takes minutes and KungFuMaster an hour; Breakout"
             " needs --preset atari, a GPU and tens of millions of frames")
# A resumed run may change these, because they say how it is run, not what it learns.
MAY_CHANGE = """device precision cuda_graphs steps log_every_steps eval_every_steps
    eval_episodes checkpoint_minutes""".split()


def training_loop(config: Config, agent: Agent, envs: Envs, replay: Replay, counters):
    """Play and learn until `steps` decisions are made, or a signal asks for the end;
    returns the signal or None. `counters` are those of START, and kept up to date."""

    metrics = Metrics(config.logdir, **counters)
    began = time.time() - counters["wall_time_s"]
    row, memory, scores = envs.reset(), None, {}
    saved_at, ending = time.monotonic(), False
    replay.add(*row)
    warn_of_dim_images(row.image)
    with stop_signals() as signals, progress_bar(config, counters["step"]) as bar:
        while not ending:
            # Act: at random while the replay fills, then as the actor says.
            before = counters["step"]
            actor = agent if before >= config.prefill_steps else None
            action, memory = choose(actor, envs, row, memory)

            # Step and store. The row of a reset is no decision.
            row = envs.step(action)
            replay.add(*row)
            step = before + int((~row.is_first).sum())
            counters.update(step=step, frames=step * envs.frames_per_step)
            counters["episodes"] += len(envs.ended)
            metrics.episodes += envs.ended
            bar.set_description("" if actor else "random play", refresh=False)
            bar.update(step - before)

            # Learn what the decisions so far ask for. A checkpoint holds both counts.
            owed = (step - config.prefill_steps) // config.steps_per_update
            for _ in range(owed - agent.updates):
                batch = replay.sample(config.batch_size, config.seq_len)
                metrics.add(agent.train_step(upload(batch, agent.device), step))
            counters.update(updates=agent.updates, wall_time_s=time.time() - began)

            # Look. Saving comes after, so that a run that is killed here looks again.
            due = lambda n: step // n > before // n or step >= config.steps
            if agent.updates and config.eval_episodes and due(config.eval_every_steps):
                try:
                    scores = look(config, agent, step)
                except Exception:  # should the game fail, no step is lost
                    save_checkpoint(config, agent, replay, counters)
                    raise

            # Log.
            ending = bool(signals) or step >= config.steps
            if scores or (metrics.count and (ending or due(config.log_every_steps))):
                line, scores = metrics.write(**counters, **scores), {}
                if (score := line["episode_return"]) is not None:  # None: none ended
                    bar.set_postfix_str(f"episode_return={score:.2f}", refresh=False)

            # Save.
            if ending or time.monotonic() - saved_at >= 60 * config.checkpoint_minutes:
                save_checkpoint(config, agent, replay, counters)
                saved_at = time.monotonic()
    return signals[0] if signals and step < config.steps else None


@contextlib.contextmanager
def stop_signals():
    """Collects Ctrl-C and SIGTERM, so that the loop ends after the decision in hand and
    its evaluation; a second one ends it at once."""
    signals, before = [], {}

    def receive(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(int(number))

    with contextlib.suppress(ValueError):  # only a main thread gets signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(config: Config, done: int) -> tqdm:
    """A bar; where standard error is a file, which it would fill, a line a minute."""
    plain = dict(mininterval=60, bar_format="{desc}{n_fmt}/{total_fmt}{postfix}\n")
    style = {} if sys.stderr.isatty() else plain
    return tqdm(total=config.steps, initial=done, unit="step", miniters=1, **style)


def warn_of_dim_images(images: np.ndarray) -> None:
    """The squared errors of near-black images vanish beside a model's other losses."""
    if images.max() < 64:
        print(f"warning: the first images are dim, brightest {images.max()} of 255,"
              f" deviation {images.std():.1f}; a wrapper should draw what they encode")


def look(config: Config, agent: Agent, steps: int) -> dict:
    """Evaluate, and draw a dream of the evaluated game into the run's folder. The run
    goes on as if nobody had looked: it gets its own random numbers back."""
    generator = RANDOM[agent.device.type]
    noise = generator.get_rng_state()
    try:
        with contextlib.closing(make_game(config, 1, EVALUATE, steps)) as envs:
            ends = evaluate(agent, envs, config.eval_episodes)
            film = draw_dream(agent, envs, sequences=4)
    except UsageError as error:
        raise UsageError(f"{error}; --eval-episodes 0 trains without evaluations")
    Path(config.logdir, "dream.png").write_bytes(to_png(film))
    generator.set_rng_state(noise)
    return dict(zip(("eval_return", "eval_length"), ends.mean(0).tolist()))


def save_checkpoint(config: Config, agent: Agent, replay: Replay, counters) -> None:
    """Weights, Adam's state, counters and random states. The file is whole before it is
    given the name of the one before, which becomes previous.pt."""
    folder, device, data = Path(config.logdir), agent.device.type, io.BytesIO()
    log_bytes = (folder / "metrics.jsonl").stat().st_size  # where resuming cuts it
    torch.save(dict(  # into memory, for on a full disk it raises a RuntimeError
        config=vars(config), counters=counters, log_bytes=log_bytes,
        agent=agent.state_dict(), noise={device: RANDOM[device].get_rng_state()},
        adam={k: o.adam.state_dict()["state"] for k, o in agent.optimizers.items()},
        sampling=replay.random.bit_generator.state), data)
    path, new = folder / "checkpoint.pt", folder / "checkpoint.new"
    try:
        with open(new, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave an empty file
        if path.exists():
            rename(path, folder / "previous.pt")
        rename(new, path)
    finally:
        new.unlink(missing_ok=True)  # a part of it, if the disk is full


def rename(old: Path, new: Path) -> None:
    """os.replace, tried again, because Windows refuses it while the file is read."""
    for seconds in (0.1, 0.5, 1, 2):
        with contextlib.suppress(PermissionError):
            return os.replace(old, new)
        time.sleep(seconds)
    os.replace(old, new)


def read_checkpoint(folder: str) -> dict | None:
    """The newest whole checkpoint of a run's folder, None where there is none. A
    damaged one is named, and the one before is read in its place."""
    found = [Path(folder, name) for name in ("checkpoint.pt", "previous.pt")]
    found = [path for path in found if path.exists()]
    for path in found:
        try:
            if zipfile.ZipFile(path).testzip():  # torch does not compare checksums
                raise ValueError("a wrong checksum")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            same_version = saved["config"].keys() == vars(Config()).keys()
            saved["path"] = path
        except (PermissionError, MemoryError):  # which say nothing of the file
            raise
        except Exception as error:  # torch and zipfile raise many kinds
            print(f"{path} is damaged: {error!r:.60}")
            continue
        if not same_version:
            raise UsageError(f"{path} is of another version: choose another --logdir")
        return saved
    if found:
        raise UsageError(f"no checkpoint in {folder} is whole")
    return None


@contextlib.contextmanager
def locked(folder: Path):
    """One process a folder. SQLite's file locks vanish with their process on every
    system, however it dies, so an open transaction is the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = sqlite3.connect(folder / "lock", timeout=0)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        raise UsageError(f"{folder} is in use, or not writable: {error}") from None
    with contextlib.closing(lock):
        yield


def make_game(config: Config, num_envs: int, purpose: int, steps: int = 0) -> Envs:
    """The config's game, seeded by what it is made for and the decisions so far."""
    seed = np.random.default_rng((config.seed, steps, purpose)).integers(2**30)
    rules = "action_repeat sticky max_noops time_limit full_action_space"
    return make_envs(config.game, num_envs, int(seed), **fields(config, rules))


def new_agent(config: Config, envs: Envs) -> Agent:
    """An agent for the config and these environments; says what was chosen."""
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    agent = Agent(config, envs.num_actions, envs.channels, device, envs.continuous)
    print(f"{config.game}: {envs.num_actions} actions, {envs.frames_per_step} frame(s)"
          f" a decision; {agent.precision} on {device}, rho {agent.mix[0]:g}")
    return agent


def resume(agent: Agent, replay: Replay | None, saved: dict) -> None:
    """Put a checkpoint's weights, Adam's state and random states where they were; the
    weights alone, if there is no replay to go on with."""
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError:  # sizes differ: somebody's own game has changed
        raise UsageError(f"{saved['path']} is of other actions or images") from None
    if replay is None:
        return
    agent.updates = saved["counters"]["updates"]
    for name, optimizer in agent.optimizers.items():
        settings = optimizer.adam.state_dict()  # lr, eps, fused: as made for this run
        optimizer.adam.load_state_dict(settings | dict(state=saved["adam"][name]))
    replay.random.bit_generator.state = saved["sampling"]
    if agent.device.type in saved["noise"]:  # not where another device made it
        RANDOM[agent.device.type].set_rng_state(saved["noise"][agent.device.type])


def train(config: Config) -> int:
    """Begin the run of config.logdir, or go on with it; returns the exit status."""
    folder = Path(config.logdir)
    if any(folder.glob("*.pt")) and not (folder / "replay" / "rows.npy").exists():
        raise UsageError(f"{folder} has a checkpoint, but its replay is missing: it"
                         " can be shown, by --eval or --dream, but not go on")
    game = make_game(config, config.num_envs, TRAIN)
    with contextlib.closing(game) as envs, locked(folder):
        saved = read_checkpoint(folder)  # under the lock, since another may just save
        counters = saved["counters"] if saved else dict(START)
        if counters["step"] >= config.steps:
            print("all --steps decisions are made: a larger --steps goes on")
            return 0
        agent = new_agent(config, envs)
        replay = Replay(
            folder / "replay", config.replay_capacity, num_envs=envs.num_envs,
            image_shape=(envs.channels, 64, 64), action_dim=envs.num_actions,
            seed=envs.seed)
        if len(replay) and not saved:
            raise UsageError(f"{folder} has a replay, but its checkpoint is missing")
        envs.seed += int(replay.written[0])  # a resumed run plays other episodes
        print(f"replay: {len(replay):,} rows, {replay.rows.nbytes / 1e9:.2f} GB")
        with open(folder / "metrics.jsonl", "a") as log:
            if saved:  # lines after the checkpoint are written again
                resume(agent, replay, saved)
                log.truncate(min(log.tell(), saved["log_bytes"]))
        (folder / "config.json").write_text(json.dumps(vars(config), indent=1))
        if not saved:  # so that a run can be resumed from its first moment on
            save_checkpoint(config, agent, replay, counters)
        elif saved["path"].name == "previous.pt":  # or a save would keep a damaged one
            rename(saved["path"], folder / "checkpoint.pt")
        del saved  # its weights are the agent's now
        try:
            number = training_loop(config, agent, envs, replay, counters)
        except (OSError, FloatingPointError, UsageError) as error:
            sys.exit(f"dreamerv2.py: {error}; the checkpoint in {folder} is good")
    print(f"{counters['step']:,} decisions, {agent.updates:,} gradient steps: {folder}")
    if not agent.updates:
        print(f"nothing was learned yet: --prefill-steps is {config.prefill_steps:,}")
    if number:
        print("stopped; the same command goes on from here")
        return 128 + number
    return 0


def show(config: Config, saved: dict | None, what: str) -> int:
    """--eval: scores of whole episodes, and 200 steps of play. --dream: what the model
    predicts. Pictures come into the current folder; the run's is only read."""
    if not saved:
        raise UsageError(f"no checkpoint in {config.logdir}: train first, or --logdir")
    game = make_game(config, 1, SHOW, saved["counters"]["step"])
    with contextlib.closing(game) as envs:
        agent = new_agent(config, envs)
        resume(agent, None, saved)
        if what == "eval":
            score, length = evaluate(agent, envs, max(1, config.eval_episodes)).T
            print(f"episodes: {len(score)}, mean score {score.mean():.2f}, median"
                  f" {np.median(score):.2f}, standard deviation {score.std():.2f},"
                  f" mean length {length.mean():.1f} decisions")
        frames = dict(eval=draw_play, dream=draw_dream)[what](agent, envs)
    words = re.findall(r"\w+", config.logdir) or ["run"]  # none in "."
    path = Path("-".join([*words, f"{what}.png"]))
    path.write_bytes(to_png(frames))
    print(f"{path}: an animation of {len(frames)} frames")
    return 0


def pick_device(name: str) -> torch.device:
    """The device of --device; UsageError if this machine does not have it."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros((), device=auto if name == "auto" else name).device
        RANDOM[device.type]  # KeyError: a kind whose random state could not be saved
    except (RuntimeError, AssertionError, KeyError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are recorded
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    return device


def flag(name: str) -> str:
    """The flag of a field of Config.
    >>> flag("kl_balance")
    '--kl-balance'
    """
    return "--" + name.replace("_", "-")


def read_flags(argv: list[str] | None) -> dict:
    """The settings that flags give; `show` is what --eval or --dream asks for. There is
    one flag for each field of Config; its help is the comment beside it."""

    def error(message):  # one line, like every other complaint
        raise UsageError(message)

    parser = argparse.ArgumentParser(
        "dreamerv2.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="DreamerV2. Trains or resumes. The defaults are preset atari's.")
    parser.error = error
    one = parser.add_mutually_exclusive_group()
    for name, help in dict(eval="watch it play", dream="draw what it predicts").items():
        one.add_argument(
            flag(name), help=help, dest="show", action="store_const", const=name)
    part_1 = Path(__file__).read_text(encoding="utf-8").split("# %% Part 2")[0]
    comments = dict(re.findall(r"\n    (\w+): .*?  # (.*)", part_1))
    choices = dict(preset=["auto", *PRESETS], precision=["auto", "fp32", "bf16"])
    for field in dataclasses.fields(Config):
        help = f"{comments[field.name]} (default: {field.default})".replace("%", "%%")
        kind = dict(type=type(field.default))
        if kind["type"] is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif field.name in choices:
            kind = dict(choices=choices[field.name])
        parser.add_argument(flag(field.name), help=help, **kind)
    return vars(parser.parse_args(argv))


def check(config: Config) -> None:
    """UsageError names the first flag whose value is out of range."""
    rows = config.num_envs * config.seq_len  # a sequence of each environment
    least = dict(prefill_steps=rows, replay_capacity=rows, num_classes=2)
    least |= dict(horizon=1 + config.shifted_advantage)  # which drops a state
    least |= dict.fromkeys(("seed", "max_noops", "anneal_steps", "eval_episodes"), 0)
    least |= dict.fromkeys(("model_lr", "actor_lr", "critic_lr", "adam_eps"), 1e-12)
    shares = """sticky gamma return_lambda kl_balance reinforce_mix reinforce_mix_end
        unimix weight_decay""".split()
    for name, value in vars(config).items():
        if type(value) in (int, float):
            low = least.get(name, 1 if type(value) is int else 0)
            high = 1 if name in shares else 10**8
            if not low <= value <= high:
                raise UsageError(f"{flag(name)} {value}: must be from {low} to {high}")


def parse_config(argv: list[str] | None) -> tuple[Config, dict | None]:
    """Command line -> checked Config, and the checkpoint of its folder. Flags go over
    the settings of that checkpoint or, in a new run, over the preset's."""
    given = {k: v for k, v in read_flags(argv).items() if k != "show"}
    on_gpu = pick_device(given.get("device", "auto")).type == "cuda"
    name, why = given.get("preset", "auto"), "as asked"
    if name == "auto":
        given.pop("preset", None)
        name, why = ("atari", WHY_ATARI) if on_gpu else ("small", WHY_SMALL)
    preset = dict(preset=name) | read_flags(PRESETS[name].split())
    config = Config(**(preset | given))
    config.game = canonical_name(config.game)
    if "game" in given:  # another spelling is no other game
        given["game"] = config.game
    game = re.sub(r"[^\w.-]", "_", config.game)
    logdir = config.logdir or f"runs/{game}-{name}-seed{config.seed}"
    config.logdir = os.path.expanduser(logdir)
    saved = read_checkpoint(config.logdir)
    if saved:
        before = saved["config"]
        new = {k: f"{flag(k)} {v} (was {before[k]})" for k, v in given.items()
               if v != before[k] and k != "logdir"}
        if refused := ", ".join(new[k] for k in new if k not in MAY_CHANGE):
            raise UsageError(f"{refused}: choose another --logdir than {config.logdir}")
        config = Config(**(before | given | dict(logdir=config.logdir)))
        why = f"{saved['counters']['step']:,} decisions made in {config.logdir}"
        why = ", ".join([why, *new.values()])
    print(f"preset {config.preset}: {why}")
    check(config)
    idle = {"sticky", "max_noops", "full_action_space", "action_repeat"} & set(given)
    if idle and config.game not in atari_roms().values():
        print(*map(flag, sorted(idle)), "affect Atari only (--action-repeat: Box, too)")
    return config, saved


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # for consoles that know no Greek letters
            stream.reconfigure(errors="replace")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where your_module:YourGame-v0 may lie
    try:
        config, saved = parse_config(argv)
        if what := read_flags(argv).get("show"):
            return show(config, saved, what)
        del saved  # train reads it under the folder's lock
        return train(config)
    except (UsageError, OSError, ImportError) as error:  # OSError: disk or folder
        print("dreamerv2.py:", *str(error).split(), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:  # of torch, of numpy
        if "alloc" not in str(error):
            raise
        print("dreamerv2.py: out of memory: lower --batch-size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nended at once; a run goes on from its last checkpoint")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
