"""The networks that SparK's encoders must serve exactly, and those that they must refuse, with the reason.

One small member per family of timm 1.0 and torchvision 0.29. `DEFAULT` are the cheap ones that between them use every
rule of the encoders; they run in the default suite, the others with ``-m slow``.
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
""".split()

DEFAULT = "resnet18".split()
REFUSED: dict[str, tuple[str, str]] = {}
ROUNDING: dict[str, float] = {}
