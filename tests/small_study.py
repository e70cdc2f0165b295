"""The YAML file of a study that takes seconds."""

STUDY = """
study: tiny
sizes: {L1-H1: deit_nano_patch8_16_L1_H1, L2-H2: deit_nano_patch8_16_L2_H2}
seeds: [0, 1]
options: {input-size: 16, batch-size: 64, num-workers: 0, cache_data: true, warmup-epochs: 0, unscale-lr: true,
  repeated-aug: false, aa: none, mixup: 0, cutmix: 0, reprob: 0, model-ema: false, eval-interval: 100}
data:
  DIGITS: {data-set: DIGITS, train-images: 320}
tuning: {seed: 100, size: L2-H2, holdout: 200}
runs:
  teacher: {kind: teacher, data: DIGITS, seeds: [0], epochs: 1, lr: 3.0e-3, options: {model: test_resnet}}
  LeTs stage 1:
    kind: stage1
    method: LeTs
    data: DIGITS
    epochs: 2
    lr: [1.0e-9, 3e-3]
    tuning: {epochs: 1}
    options: {src-arch: deit_nano_patch8_16_L2_H1, tgt-arch: deit_nano_patch8_16_L4_H2, distillation-type: soft,
      teacher-model: test_resnet, teacher-path: "{teacher}/model.safetensors"}
  LeTs:
    kind: vit
    data: DIGITS
    sizes: [L1-H1]
    epochs: [0, 1]
    stored: LeTs stage 1
    lr: scratch
    options: {des-arch: "{arch}", load-gene: "{LeTs stage 1}/learngene.safetensors"}
  scratch: {kind: vit, data: DIGITS, seeds: [0], epochs: [1], lr: 3.0e-3, options: {model: "{arch}"}}
  weight selection:
    kind: vit
    data: DIGITS
    seeds: [0]
    sizes: [L1-H1]
    epochs: [0]
    stored: scratch/L2-H2/1
    options: {model: "{arch}", init: weight_selection, init-path: "{scratch/L2-H2/1}/model.safetensors"}
report: {learngenes: [LeTs], scratch: scratch, first: DIGITS, baselines: [weight selection]}
"""
