"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            "linear-attention",
            summary="Linear attention: softmax's kernel replaced by a feature map, normalised",
            description=(
                "S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = S_t^T phi(q_t) / z_t . phi(q_t),\n"
                "in heads, phi(x) = elu(x) + 1 by default: attention whose cost is linear in T. Without ctx.causal\n"
                "every token reads the sums over all of them.\n"
                "Linear in T: 8 D^2 FLOPs of projections and 4 D K of recurrence per token, K = D / heads.\n"
                "State: D (K + 1) numbers per row however long the sequence.\n"
                "Use it as the baseline of its family: nothing is ever forgotten, so gla or the delta rule recall more."
            ),
            build="altx_linear_attention.linear_attention:build",
            config="altx_linear_attention.config:LinearAttentionConfig",
            capabilities="altx_linear_attention.config:linear_attention",
            paper="Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236",
        ),
        MixerSpec(
            "gla",
            summary="Gated linear attention: a decay for every key channel, computed from the token",
            description=(
                "S_t = diag(a_t) S_{t-1} + k_t v_t^T,  y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t)), in heads;\n"
                "a_t = sigmoid(low-rank map of x_t)^(1/16), so that each token decides what each row of S forgets.\n"
                "Linear in T: about 8 D^2 FLOPs of projections and 5 D K of recurrence per token, K = D / 2 / heads.\n"
                "State: D K numbers per row however long the sequence; 3 inputs more per channel with short_conv.\n"
                "Use it where a model has to forget selectively and training must stay matrix products."
            ),
            build="altx_linear_attention.gla:build",
            config="altx_linear_attention.gla_config:GLAConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Yang et al. 2023, Gated Linear Attention Transformers, arXiv:2312.06635",
        ),
        MixerSpec(
            "retnet",
            summary="RetNet: multi-scale retention, a fixed decay for each head, and rotary positions",
            description=(
                "S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T,  y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t)), in heads h;\n"
                "q and k are turned by their position. Decays are fixed: heads see the last 32 to 2^(5+h) tokens.\n"
                "Linear in T: 16 D^2 FLOPs of projections and 8 D K of recurrence per token, K = 256 key channels.\n"
                "State: 2 D K numbers per row however long the sequence.\n"
                "Use it as the baseline of decay that does not depend on the data; gla's does."
            ),
            build="altx_linear_attention.retnet:build",
            config="altx_linear_attention.retnet_config:RetNetConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Sun et al. 2023, Retentive Network: A Successor to Transformer, arXiv:2307.08621",
        ),
        MixerSpec(
            "lightning",
            summary="Lightning attention: linear attention with a fixed decay per head and block, as in MiniMax-01",
            description=(
                "S_t = exp(-s) S_{t-1} + k_t v_t^T,  y_t = W_o (norm(S_t^T q_t) * sigmoid(W_g x_t)), in heads;\n"
                "q, k and v pass silu; s = 2^(-8 (h+1) / H) (1 - layer / (L - 1)), so the last blocks hardly forget.\n"
                "Linear in T: 10 D^2 FLOPs of projections and 4 D K of recurrence per token, K = head width.\n"
                "State: D K numbers per row however long the sequence.\n"
                "Use it as MiniMax does: seven of these to one softmax attention."
            ),
            build="altx_linear_attention.lightning:build",
            config="altx_linear_attention.lightning_config:LightningConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Qin et al. 2024, Lightning Attention-2, arXiv:2401.04658; MiniMax 2025, arXiv:2501.08313",
        ),
        MixerSpec(
            "deltanet",
            summary="DeltaNet: a linear attention that corrects what it recalls (the delta rule)",
            description=(
                "S_t = (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  y_t = W_o norm(S_t^T q_t), in heads; q and\n"
                "k of length 1 behind short convolutions: what k_t recalls is replaced by v_t, in part beta_t.\n"
                "Linear in T: 8 D^2 FLOPs of projections and 7 D K of recurrence per token, K = D / heads.\n"
                "State: D (K + 9) numbers per row however long the sequence.\n"
                "Use it for associative recall; nothing fades, so gated-deltanet is better at letting go of old text."
            ),
            build="altx_linear_attention.deltanet:build",
            config="altx_linear_attention.deltanet_config:DeltaNetConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length, "
            "arXiv:2406.06484",
        ),
        MixerSpec(
            "hgrn2",
            summary="HGRN2: a gated linear recurrence with a matrix state, whose key is 1 - its forget gate",
            description=(
                "S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T,  y_t = W_o norm(S_t^T silu(W_q x_t)), in heads;\n"
                "f_t = b + (1 - b) sigmoid(W_f x_t), with a learned lower bound b that rises from block to block, so\n"
                "that the last blocks remember longest. gla without a projection for the keys.\n"
                "Linear in T: 8 D^2 FLOPs of projections and 5 D K of recurrence per token, K = 128.\n"
                "State: D K numbers per row however long the sequence."
            ),
            build="altx_linear_attention.hgrn2:build",
            config="altx_linear_attention.hgrn2_config:HGRN2Config",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Qin et al. 2024, HGRN2: Gated Linear RNNs with State Expansion, arXiv:2404.07904",
        ),
        MixerSpec(
            "mlstm",
            summary="mLSTM of xLSTM: a matrix memory with exponential input gates and a normaliser",
            description=(
                "C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,  n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t,\n"
                "y_t = W_o (sigmoid(W_g x_t) * norm(C_t^T q_t / max(|n_t . q_t|, 1))), in heads, in log space, so\n"
                "that nothing overflows. i and f are one number per head and token: a token may outweigh all others.\n"
                "Linear in T: 8 D^2 FLOPs of projections and 5 D K of recurrence per token, K = D / 2 / heads.\n"
                "State: D K + D / 2 + heads numbers per row however long the sequence. The layer of xLSTM 7B, or,\n"
                "with block pre-up, that of the first paper, twice as wide, behind a short convolution."
            ),
            build="altx_linear_attention.mlstm:build",
            config="altx_linear_attention.mlstm_config:MLSTMConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Beck et al. 2024, xLSTM, arXiv:2405.04517; Beck et al. 2025, xLSTM 7B, arXiv:2503.13427",
        ),
        MixerSpec(
            "gated-deltanet",
            summary="Gated DeltaNet: a state that decays as Mamba-2's and is corrected by the delta rule",
            description=(
                "S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,\n"
                "y_t = W_o (norm(S_t^T q_t) * silu(z_t)), in heads; q and k of length 1 behind short convolutions,\n"
                "alpha_t and beta_t a number each: what k_t recalls is replaced by v_t, all fades as the token says.\n"
                "Linear in T: 12 D^2 FLOPs of projections and 7 V K per value head of recurrence per token.\n"
                "State: V K numbers per value head, 3 inputs per channel of q, k, v, however long the sequence.\n"
                "The linear mixer of Qwen3-Next and Olmo-Hybrid, 3 blocks of it for one of attention: a strong default."
            ),
            build="altx_linear_attention.gated_deltanet:build",
            config="altx_linear_attention.gated_deltanet_config:GatedDeltaNetConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464",
        ),
        MixerSpec(
            "kda",
            summary="Kimi Delta Attention: the delta rule with a decay for every key channel",
            description=(
                "S_t = (1 - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,\n"
                "y_t = W_o (norm(S_t^T q_t) * sigmoid(z_t)), in heads; alpha_t and z_t of low-rank maps of x_t: each\n"
                "key channel forgets at its own rate, which also takes the place of position encodings.\n"
                "Linear in T: 8 D^2 FLOPs and the low-rank maps of projections, 7 D K of recurrence per token.\n"
                "State: D (K + 9) numbers per row however long the sequence, K = 128.\n"
                "The linear mixer of Kimi Linear, 3 blocks of it for one of attention without positions."
            ),
            build="altx_linear_attention.kda:build",
            config="altx_linear_attention.kda_config:KDAConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Kimi Team 2025, Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692",
        ),
    ]
