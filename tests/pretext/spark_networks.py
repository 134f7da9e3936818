"""The networks that SparK's encoders must serve exactly, and those that they must refuse, with the reason.

One small member per family of timm 1.0 and torchvision 0.29.
"""

EXACT = """
resnet18 resnet18d resnext26ts resnext50_32x4d seresnet18 seresnet33ts ecaresnet26t eca_resnet33ts
resnetv2_18 resnetv2_50d_gn resnetv2_50x1_bit
nf_regnet_b0 nf_resnet26 eca_nfnet_l0 dm_nfnet_f0
convnext_atto convnext_atto_ols convnext_atto_rms convnextv2_atto inception_next_atto
efficientnet_b0 efficientnet_b0_gn efficientnet_b0_g16_evos tf_efficientnet_b0 efficientnetv2_rw_t
mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenet_edgetpu_v2_xs
regnetx_002 regnety_002 regnetz_005 repvgg_a0 mobileone_s0 mobileone_s4
densenet121 dpn48b dpn68b vovnet39a ese_vovnet19b_slim_dw
ghostnet_050 ghostnetv2_100 ghostnetv3_050 mixnet_s res2net50_14w_8s dla34 dla46_c dla60_res2net hrnet_w18_small
rexnet_100 rexnetr_100 skresnet18 resnest14d selecsls42b
cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 cs3darknet_s cs3darknet_focus_s cs3sedarknet_xdw
darknet21 darknetaa53 sedarknet21 hgnet_tiny hgnetv2_b0 xception41 xception41p
mnasnet_small semnasnet_050 spnasnet_100 fbnetc_100 fbnetv3_b tinynet_e lcnet_035 lcnetv2_small repghostnet_050
starnet_s050 rdnet_tiny mambaout_femto poolformer_s12 poolformerv2_s12 convformer_s18 fastvit_t8
gernet_s hardcorenas_a legacy_seresnet18 legacy_senet154 senet154 repvit_m0_9 focalnet_tiny_srf vgg11_bn
test_resnet test_convnext test_efficientnet
tv:resnet18 tv:resnext50_32x4d tv:convnext_tiny tv:mobilenet_v2 tv:mobilenet_v3_large tv:shufflenet_v2_x0_5
tv:densenet121 tv:efficientnet_b0 tv:efficientnet_v2_s tv:regnet_y_400mf tv:mnasnet0_5 tv:vgg11_bn
tv:googlenet
""".split()  # noqa: SIM905

# Cheap ones that between them use nearly every rule of both encoders (timm's test nets are members of the families
# above, with two blocks); the default suite runs these alone.
DEFAULT = """
resnet18 convnextv2_atto regnety_002 resnest14d nf_regnet_b0 inception_next_atto mobilenetv3_small_050 hgnetv2_b0
cs3darknet_focus_s cspnext_tiny poolformer_s12 starnet_s050 lcnet_035 tv:shufflenet_v2_x0_5
test_efficientnet test_efficientnet_gn test_efficientnet_ln test_mambaout test_nfnet test_byobnet
""".split()  # noqa: SIM905

# Layers that compute in float32 whatever they are given; the tests keep them in float64 to compare.
CASTS_INSIDE = ["resnetv2_50d_frn", "resnetv2_50d_evos", "efficientvit_b0"]

# Beyond EXACT: networks whose layers cast, and those that one encoder serves and the other refuses.
MORE = {
    "resnetv2_50d_frn": ("dense", "packed"),
    "resnetv2_50d_evos": ("dense", "packed"),
    "efficientvit_b0": ("dense",),
    "gcresnet33ts": ("packed",),
}

# Refused, with what the message must say: (slow, by the dense encoder, by the packed one). An empty reason: that
# encoder serves the network after all, or the network itself rejects the small images of the check.
REFUSED = {
    # sides that are not the image's over the stride: convolutions or pools without padding
    "tv:squeezenet1_1": (
        False,
        r"features\.0 \(Conv2d\).*31x95 .*does not fit",
        r"conv2d in features\.0 \(Conv2d\)",
    ),
    "tv:alexnet": (True, r"features\.0 \(Conv2d\).*does not fit", r"conv2d in features\.0 \(Conv2d\)"),
    "convmixer_768_32": (True, "powers of two", "powers of two"),
    "legacy_xception": (True, r"conv1 \(Conv2d\).*does not fit", r"conv2d in conv1 \(Conv2d\)"),
    "tv:inception_v3": (True, "does not run", r"conv2d in Conv2d_1a_3x3\.conv \(Conv2d\)"),
    "inception_v3": (True, "does not run", r"conv2d in Conv2d_1a_3x3\.conv \(Conv2d\)"),
    "inception_v4": (True, "does not run", r"conv2d in features\.0\.conv \(Conv2d\)"),
    "inception_resnet_v2": (True, "does not run", r"conv2d in conv2d_1a\.conv \(Conv2d\)"),
    # attention and other mixing of tokens
    "vit_tiny_patch16_224": (False, r"blocks\.0\.norm1 \(LayerNorm\): works on tokens", "cat in backbone"),
    "swin_tiny_patch4_window7_224": (
        False,
        r"attn\.qkv \(Linear\): works on tokens",
        r"view in layers\.0\.blocks\.0 ",
    ),
    "tv:swin_t": (True, r"features\.1\.0\.attn \(ShiftedWindowAttention\)", r"view in features\.1\.0\.attn "),
    "edgenext_xx_small": (False, r"norm_xca \(LayerNorm\): works on tokens", r"in stages\.1\.blocks\.1 "),
    "pvt_v2_b0": (
        True,
        r"blocks\.0\.norm1 \(LayerNorm\): works on tokens",
        r"permute in stages\.0\.blocks\.0\.attn ",
    ),
    "caformer_s18": (True, r"stages\.2\.blocks\.0\.norm1 ", r"permute in stages\.2\.blocks\.0\.token_mixer "),
    "davit_tiny": (True, r"norm1 \(LayerNorm\): works on tokens", r"\(SpatialBlock\)"),
    "tiny_vit_5m_224": (True, r"attn\.norm \(LayerNorm\): works on tokens", r"\(TinyVitBlock\)"),
    "nextvit_small": (True, r"e_mhsa\.q \(Linear\): works on tokens", r"avg_pool1d in .*sr \(AvgPool1d\)"),
    "mobilenetv4_hybrid_medium": (True, r"blocks\.2\.4\.attn\.output", r"\(MultiQueryAttention2d\)"),
    "shvit_s1": (
        False,
        r"stages\.1\.blocks\.0\.mixer\.m\.",
        r"matmul__ in stages\.1\.blocks\.0\.mixer\.m \(SHSA\)",
    ),
    "efficientvit_m0": (True, r"mixer\.m\.attn\.qkvs\.0\.conv", r"\(LocalWindowAttention\)"),
    "lambda_resnet26t": (True, r"conv_lambda \(Conv3d\)", r"\(LambdaLayer\)"),
    "levit_128s": (True, "does not run", r"flatten in .*qkv \(LinearNorm\)"),
    "levit_conv_128s": (True, "does not run", r"matmul__ in .*\(Attention\)"),
    "maxvit_pico_rw_256": (True, "does not run", r"\(PartitionAttentionCl\)"),
    "coatnet_pico_rw_224": (True, "does not run", r"\(Attention2d\)"),
    "efficientformer_l1": (True, "does not run", r"token_mixer \(Attention\)"),
    "efficientformerv2_s0": (True, "does not run", ""),
    "tv:maxvit_t": (True, "does not run", ""),
    "botnet26t_256": (True, "does not run", ""),
    "halonet26t": (True, "does not run", ""),
    "haloregnetz_b": (True, "does not run", ""),
    "visformer_tiny": (True, "does not run", ""),
    "mixer_s32_224": (True, "does not run", ""),
    # one layer without a rule
    "efficientvit_b0": (
        True,
        "",
        r"\(LiteMLA\)",
    ),  # ReLU attention: zeros in, nothing out; the dense encoder is exact
    "gcresnet33ts": (
        False,
        r"inside stages\.0\.0\.attn\.mlp_add",
        "",
    ),
    "densenetblur121d": (True, r"features\.pool0\.1 \(BlurPool2d\)", r"reflect"),
}
