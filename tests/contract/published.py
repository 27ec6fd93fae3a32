"""What the sources of the recipes give: schedules and accuracies, for test_recipes.py."""

from __future__ import annotations

# batch, epochs, learning rate at the first step, at its peak and after the last step, weight decay
PUBLISHED = {
    "byol_r50_in1k": (4096, 1000, 0.0, 3.2, 0.0, 1.5e-6),
    "byol_r50_in1k_100ep": (4096, 100, 0.0, 7.2, 0.0, 1e-6),
    "byol_r50_in1k_200ep": (4096, 200, 0.0, 4.8, 0.0, 1e-6),
    "byol_r50_in1k_300ep": (4096, 300, 0.0, 4.8, 0.0, 1e-6),
    "simclr_r50_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1e-6),
    "simclr_r50_in1k_100ep": (4096, 100, 0.0, 4.8, 0.0, 1e-6),
    "simclr_r50_in1k_200ep": (4096, 200, 0.0, 4.8, 0.0, 1e-6),
    "simclrv2_r50sk_in1k": (4096, 800, 0.0, 6.4, 0.0, 1e-4),
    "simclrv2_r152x3sk_in1k": (4096, 800, 0.0, 6.4, 0.0, 1e-4),
    "swav_r50_in1k": (4096, 800, 0.3, 4.8, 0.0048, 1e-6),
    "swav_r50_in1k_100ep": (4096, 100, 0.3, 4.8, 0.0048, 1e-6),
    "swav_r50_in1k_200ep": (4096, 200, 0.3, 4.8, 0.0048, 1e-6),
    "swav_r50x2_in1k": (4096, 400, 0.3, 4.8, 0.0048, 1e-6),
    "swav_r50x4_in1k": (2560, 400, 0.3, 4.8, 0.0048, 1e-6),
    "deepcluster_v2_r50_in1k": (4096, 800, 0.3, 4.8, 0.0048, 1e-6),
    "deepcluster_v2_r50_in1k_400ep": (4096, 400, 0.3, 4.8, 0.0048, 1e-6),
    "relicv2_r50_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1.5e-6),
    "relicv2_r50_in1k_100ep": (4096, 100, 0.0, 4.8, 0.0, 1.5e-6),
    "relicv2_r50_in1k_200ep": (4096, 200, 0.0, 4.8, 0.0, 1.5e-6),
    **{
        f"byol_{size}_in1k": (4096, 1000, 0.0, 3.2, 0.0, 1.5e-6)
        for size in ("r50x2", "r50x4", "r200x2")
    },
    **{f"simclr_{size}_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1e-6) for size in ("r50x2", "r50x4")},
    **{
        f"relicv2_{size}_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1.5e-6)
        for size in ("r50x2", "r50x4", "r101", "r152", "r200", "r200x2", "r295")
    },
    "byol_r18_cifar10": (256, 1000, 0.0, 1.0, 0.0, 1e-5),
    "simclr_r18_cifar10": (512, 1000, 0.0, 2.0, 0.0, 1e-4),
    "swav_r18_cifar10": (256, 1000, 0.0, 0.6, 0.0, 1e-6),
    "deepcluster_v2_r18_cifar10": (256, 1000, 0.0, 0.6, 0.0006, 1e-6),
    **{
        f"{method}_r50_in1k": (256, 200, 0.03, 0.03, 0.0, 1e-4)
        for method in ("moco", "densecl", "pcl")
    },
    "mocov1_r50_in1k": (256, 200, 0.03, 0.03, 0.0003, 1e-4),
    "moco_r50_in1k_800ep": (256, 800, 0.03, 0.03, 0.0, 1e-4),
    "nnclr_r50_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1e-6),
    "pirl_r50_in1k": (1024, 800, 0.12, 0.12, 1.2e-4, 1e-4),
    **{
        f"{method}_r18_cifar10": (256, 1000, 0.0, 0.3, 0.0, 1e-4)
        for method in ("moco", "densecl", "pcl")
    },
    "pirl_r18_cifar10": (256, 1000, 0.0, 0.03, 0.0, 1e-4),
    "nnclr_r18_cifar10": (256, 1000, 0.0, 0.4, 0.0, 1e-5),
    "relicv2_r18_cifar10": (256, 1000, 0.0, 1.0, 0.0, 1e-5),
    "simsiam_r50_in1k": (512, 100, 0.1, 0.1, 0.0, 1e-4),
    "simsiam_r18_cifar10": (256, 1000, 0.0, 0.5, 0.0, 1e-5),
    "barlow_twins_r50_in1k": (2048, 1000, 0.0, 1.6, 0.0016, 1e-6),
    "barlow_twins_r18_cifar10": (256, 1000, 0.0, 0.3, 0.0, 1e-4),
    "vicreg_r50_in1k": (2048, 1000, 0.0, 1.6, 0.0016, 1e-6),
    "vicreg_r18_cifar10": (256, 1000, 0.0, 0.3, 0.0, 1e-4),
    "relic_r50_in1k": (4096, 1000, 0.0, 3.2, 0.0, 1.5e-6),
    "relic_r18_cifar10": (256, 1000, 0.0, 1.0, 0.0, 1e-5),
    "directpred_r50_in1k": (4096, 300, 0.0, 4.8, 0.0, 1e-6),
    "directpred_r18_cifar10": (128, 100, 0.03, 0.03, 0.03, 4e-4),
    "c_simclr_r50_in1k": (4096, 1000, 0.0, 3.2, 0.0, 1.5e-6),
    "c_simclr_r18_cifar10": (512, 1000, 0.0, 2.0, 0.0, 1e-4),
    "c_byol_r50_in1k": (4096, 1000, 0.0, 4.0, 0.0, 1.5e-6),
    "c_byol_r18_cifar10": (256, 1000, 0.0, 1.0, 0.0, 1e-5),
    "deepcluster_r50_in1k": (512, 200, 0.1, 0.1, 0.1, 1e-5),
    "deepcluster_r18_cifar10": (256, 200, 0.05, 0.05, 0.05, 1e-5),
    "byol_rotation_r50_in1k": (4096, 100, 0.0, 7.2, 0.0, 1e-6),
    "simclr_rotation_r50_in1k": (4096, 100, 0.0, 4.8, 0.0, 1e-6),
    "simsiam_rotation_r50_in1k": (512, 100, 0.1, 0.1, 0.0, 1e-4),
    "moco_rotation_r50_in1k": (256, 200, 0.03, 0.03, 0.0, 1e-4),
    "swav_rotation_r50_in1k": (1024, 30, 0.3, 1.2, 0.0012, 1e-6),
    "byol_rotation_r18_cifar10": (256, 200, 0.0, 1.0, 0.0, 1e-5),
    "simclr_rotation_r18_cifar10": (512, 200, 0.0, 2.0, 0.0, 1e-4),
    "simsiam_rotation_r18_cifar10": (256, 200, 0.0, 0.5, 0.0, 1e-5),
    "swav_rotation_r18_cifar10": (256, 200, 0.0, 0.6, 0.0, 1e-6),
    "simclr_suncet_r50_in1k": (2816, 500, 0.6, 4.8, 0.048, 1e-6),
    "swav_suncet_r50_in1k": (4096, 400, 0.3, 4.8, 0.0048, 1e-6),
    "simclr_suncet_r18_cifar10": (512, 1000, 0.0, 2.0, 0.0, 1e-4),
    "swav_suncet_r18_cifar10": (256, 1000, 0.0, 0.6, 0.0, 1e-6),
    **{f"{method}_r50_in1k": (4096, 100, 0.0, 4.8, 0.0, 1e-6) for method in ("margin", "triplet")},
    **{
        f"{method}_r18_cifar10": (512, 1000, 0.0, 2.0, 0.0, 1e-4)
        for method in ("margin", "triplet")
    },
    "moco_rotation_r18_cifar10": (256, 200, 0.0, 0.3, 0.0, 1e-4),
    "supervised_r50_in1k": (4096, 90, 0.0, 1.6, 0.0, 1e-4),
    "supervised_r18_cifar10": (1024, 500, 0.0, 0.8, 0.0, 1e-4),
    "supcon_r50_in1k": (4096, 700, 0.0, 4.8, 0.0, 1e-6),
    "supcon_r18_cifar10": (1024, 1000, 0.0, 0.5, 0.0005, 1e-4),
}

# Linear top-1 in the sources. Some are recalled, or taken from another paper: such a recipe must
# say "not verified".
ACCURACY = {
    "byol_r50_in1k": 74.3,
    "byol_r50_in1k_200ep": 71.8,
    "byol_r200x2_in1k": 79.6,
    "simclr_r50_in1k": 69.3,
    "simclr_r50_in1k_100ep": 64.5,
    "simclr_r50_in1k_200ep": 66.6,
    "simclr_r50x2_in1k": 74.2,
    "simclr_r50x4_in1k": 76.5,
    "simclrv2_r50sk_in1k": 74.6,
    "simclrv2_r152x3sk_in1k": 79.8,
    "swav_r50_in1k": 75.3,
    "swav_r50_in1k_100ep": 72.1,
    "swav_r50_in1k_200ep": 73.9,
    "swav_r50x2_in1k": 77.3,
    "swav_r50x4_in1k": 77.9,
    "deepcluster_v2_r50_in1k": 75.2,
    "deepcluster_v2_r50_in1k_400ep": 74.3,
    "moco_r50_in1k": 67.7,
    "moco_r50_in1k_800ep": 71.1,
    "mocov1_r50_in1k": 60.6,
    "pcl_r50_in1k": 67.6,
    "pirl_r50_in1k": 64.3,
    "relicv2_r50_in1k": 77.1,
    "simsiam_r50_in1k": 68.1,
    "barlow_twins_r50_in1k": 73.5,
    "vicreg_r50_in1k": 73.2,
    "relic_r50_in1k": 74.8,
    "c_simclr_r50_in1k": 71.7,
    "c_byol_r50_in1k": 75.8,
    "deepcluster_r50_in1k": 46.9,
    "swav_rotation_r50_in1k": 57.3,
    "simclr_suncet_r50_in1k": 66.7,
    "swav_suncet_r50_in1k": 70.8,
}
RECALLED = {
    "byol_r50_in1k_300ep": 72.5,
    "byol_r50x2_in1k": 77.4,
    "byol_r50x4_in1k": 78.6,
    "relicv2_r50x2_in1k": 79.0,
    "relicv2_r50x4_in1k": 79.4,
    "relicv2_r101_in1k": 78.7,
    "relicv2_r152_in1k": 79.3,
    "relicv2_r200_in1k": 79.8,
    "relicv2_r200x2_in1k": 80.6,
    "nnclr_r50_in1k": 75.4,
    "directpred_r50_in1k": 72.4,
    "supervised_r50_in1k": 75.4,
    "supervised_r18_cifar10": 95.0,
    "supcon_r50_in1k": 78.7,
    "supcon_r18_cifar10": 96.0,
}
