"""Features of LAMMPS around pair_style mliap/py, each against pair_style lj/cut.

A process runs a script with lj/cut, clears, and runs it again with the Lennard-Jones unified
object; thermo output and all per-atom quantities of the end have to agree. Neighbour lists,
communication, types, virials and everything else between LAMMPS and Python is in this comparison;
that a network gives what Python gives is test_lammps_hipnn.py.
"""

import numpy as np
import pytest
from lammps_helpers import lmp_in_turn, needs_lammps
from lammps_twins import RCUT, Feature, assert_twins, lj, py, write_inputs

pytestmark = needs_lammps

OVERLAY = "pair_coeff * * lj/cut 0.002 3.1"
ZBL = "pair_coeff * * zbl 18 18"
EDIT = """
run 2
displace_atoms all ramp x 0 0.8 y 0 15
run 1
group some id 3:80:4
set group some type 1
run 1
change_box all x final 0 16.5 y scale 1.02 remap units box
run 1
change_box all triclinic xy final 2.0 remap units box
run 1
replicate 2 1 1
run 2
"""
VANISH = """
run 2
delete_atoms random count 17 yes all NULL 123
run 2
create_atoms 2 random 8 456 NULL overlap 2.9 maxtry 200
run 2
group old id 1:20
delete_atoms group old compress yes
reset_atoms id
run 3
"""
GROW = """
region top block 0 15.8 0 15.8 24 30
fix in all deposit 4 1 2 777 region top near 2.0 vz -1 -2
run 9
unfix in
region low block 0 15.8 0 15.8 0 9
fix out all evaporate 3 4 low 888
run 8
"""
MONTE_CARLO = """
fix mc all gcmc 2 20 4 1 29494 300.0 -0.25 0.4 overlap_cutoff 2.9 full_energy
run 8
unfix mc
group one type 1
fix swap all atom/swap 2 4 1234 300.0 ke no types 1 2
run 4
"""
RERUN = """
dump keep all custom 3 traj.{tag} id type x y z
dump_modify keep format float %.17g
run 6
undump keep
rerun traj.{tag} dump x y z
"""
RESTART = """
run 3
write_restart half.{tag}
clear
read_restart half.{tag}
{pair}
{again}
run 6
"""
DATA = """
run 3
write_data half.{tag} nocoeff
clear
units metal
read_data half.{tag}
{pair}
{again}
run 6
"""
SPREAD = "neigh_modify every 1 delay 0 check no"
FEATURES = {
    "type map": Feature(pairs=(lj(), py(coeff="* * Ar Kr"))),
    "types swapped": Feature(
        body="set type 1 type 3\nset type 2 type 1\nset type 3 type 2\nrun 3",
        box="read_data atoms.data extra/atom/types 1",
        pairs=(
            lj().replace("1 2", "2 3").replace("coeff 1 1", "coeff 3 3").replace("2 3", "1 2")
            + "\npair_coeff 1 3 0.0118 3.52\npair_coeff 2 3 0.014 3.65\n"
            "pair_coeff 3 3 0.014 3.65\npair_coeff 1 1 0.0103 3.405",
            py(coeff="* * Ar Kr Kr"),
        ),
    ),
    "explicit name": Feature(
        pairs=(lj(), "suffix off\n" + py("mliap/py unified model.pkl") + "\nsuffix on")
    ),
    "names of KOKKOS": Feature(pairs=(lj(), py("mliap unified gpu.pkl 0"))),
    "hybrid with NULL": Feature(
        pairs=(
            lj(),
            py(f"hybrid mliap unified model.pkl 0 lj/cut {RCUT}", "* * mliap NULL Kr")
            + "\npair_coeff 1 1 lj/cut 0.0103 3.405\npair_coeff 1 2 lj/cut 0.0118 3.52",
        )
    ),
    "two in one hybrid": Feature(
        pairs=(
            lj(),
            f"pair_style hybrid mliap unified model.pkl 0 mliap unified kr.pkl 0 lj/cut {RCUT}\n"
            "pair_coeff * * mliap 1 Ar NULL\npair_coeff * * mliap 2 NULL Kr\n"
            "pair_coeff 1 2 lj/cut 0.0118 3.52",
        )
    ),
    "two in one overlay": Feature(
        pairs=(
            lj(f"hybrid/overlay lj/cut {RCUT} lj/cut {RCUT}", "lj/cut 1")
            + "\npair_coeff 2 2 lj/cut 2 0.014 3.65",
            "pair_style hybrid/overlay mliap unified model.pkl 0 mliap unified kr.pkl 0\n"
            "pair_coeff * * mliap 1 Ar Kr\npair_coeff * * mliap 2 NULL Kr",
        )
    ),
    "overlay with zbl": Feature(
        pairs=(
            lj(f"hybrid/overlay lj/cut {RCUT} zbl 3.0 4.5", "lj/cut") + f"\n{ZBL}",
            py("hybrid/overlay mliap unified model.pkl 0 zbl 3.0 4.5", "* * mliap Ar Kr")
            + f"\n{ZBL}",
        )
    ),
    "overlay with a longer lj/cut": Feature(
        pairs=(
            lj(f"hybrid/overlay lj/cut {RCUT} lj/cut 9.0", "lj/cut 1")
            + "\npair_coeff * * lj/cut 2 0.002 3.1",
            py("hybrid/overlay mliap unified model.pkl 0 lj/cut 9.0", "* * mliap Ar Kr")
            + f"\n{OVERLAY}",
        )
    ),
    "hybrid/scaled": Feature(
        pairs=(
            lj(f"hybrid/scaled 0.3 lj/cut {RCUT} 0.7 lj/cut 9.0", "lj/cut 1")
            + "\npair_coeff * * lj/cut 2 0.002 3.1",
            py("hybrid/scaled 0.3 mliap unified model.pkl 0 0.7 lj/cut 9.0", "* * mliap Ar Kr")
            + f"\n{OVERLAY}",
        )
    ),
    "strongly tilted": Feature(head="box tilt large", tilt=(14.0, -13.0, 12.0)),
    "fixed and shrink-wrapped": Feature(head="boundary f p s"),
    "atoms lost": Feature(
        head="boundary f f f",
        body="thermo_modify lost ignore\nset atom 1*10 vx 900\nset atom 30*35 vz -900\n"
        f"{SPREAD}\nrun 9",
    ),
    "two dimensions": Feature(
        head="dimension 2\nboundary p p p",
        box="region b block 0 19.5 0 15.6 -0.5 0.5\ncreate_box 2 b\nlattice sq 3.9\n"
        "create_atoms 1 box\nset group all type/fraction 2 0.5 12\n"
        "displace_atoms all random 0.2 0.2 0 5 units box",
        body="velocity all set NULL NULL 0\nfix flat all enforce2d\nrun 9",
    ),
    "sorting": Feature(head="atom_modify sort 1 3.0", body=f"{SPREAD}\nrun 9"),
    "map and first": Feature(head="atom_modify map hash", body=f"{SPREAD}\nrun 9"),
    "group first": Feature(body=f"group g type 2\natom_modify first g\n{SPREAD}\nrun 6"),
    "tiled": Feature(head="comm_style tiled", body="balance 1.0 rcb\nrun 9", height=40.0),
    "fix balance": Feature(
        body=f"fix even all balance 2 1.0 shift xyz 5 1.05\n{SPREAD}\nrun 9", height=40.0
    ),
    "fix balance tiled": Feature(
        head="comm_style tiled", body=f"fix even all balance 2 1.0 rcb\n{SPREAD}\nrun 9"
    ),
    "neighbour lists": Feature(
        body="neighbor 0.0 nsq\nneigh_modify page 20000 one 2000\nrun 3\nneighbor 2.0 multi\n"
        "comm_modify mode single cutoff 12.0 vel yes\nrun 3\nneighbor 0.5 bin\n"
        "neigh_modify binsize 2.0 every 2 delay 4 check yes\nrun 3"
    ),
    "npt iso": Feature(body="unfix nve\nfix npt all npt temp 150 150 0.1 iso 0 500 0.5\nrun 9"),
    "npt tri": Feature(
        body="unfix nve\nfix npt all npt temp 150 150 0.1 tri 0 500 0.5\nrun 9",
        tilt=(2.0, 1.0, -1.0),
    ),
    "fix deform": Feature(
        body="fix pull all deform 1 x erate 1.0 yz erate -1.0 remap v flip no\nrun 9",
        tilt=(2.0, 1.0, -1.0),
    ),
    # line searches amplify rounding
    "minimize": Feature(body="minimize 0 1e-8 8 40\nrun 3", tolerance=1e-9),
    "minimize fire": Feature(body="min_style fire\nminimize 0 1e-8 8 40", tolerance=1e-9),
    "box/relax": Feature(
        body="fix box all box/relax iso 0.0 vmax 0.001\nminimize 0 1e-8 8 40", tolerance=1e-9
    ),
    "rerun": Feature(body=RERUN, head="atom_modify sort 0 0"),
    "restart": Feature(body=RESTART),
    "data file": Feature(body=DATA),
    "respa": Feature(body="run_style respa 2 2 bond 1 pair 2\nrun 9"),
    "exclude group": Feature(
        body="group fixed id 5:40\nneigh_modify exclude group fixed fixed\nrun 6\n"
        "neigh_modify exclude none\nrun 3"
    ),
    "exclude type": Feature(body="neigh_modify exclude type 1 2\nrun 6"),
    "monte carlo": Feature(body=MONTE_CARLO, height=40.0),
    "deposit and evaporate": Feature(body=GROW, height=40.0),
    "delete and create": Feature(body=VANISH),
    "edit": Feature(body=EDIT),
    "runs": Feature(body="run 0\nrun 2\nrun 2 pre no\nrun 2 post no\nrun 3 every 1 'print a'"),
    "pair_style again": Feature(
        body="run 2\n{pair}\nrun 2\npair_style zero 5.0\npair_coeff * *\nrun 1\n{pair}\nrun 3"
    ),
    "pair_coeff again": Feature(pairs=(lj(), py(coeff="* * Kr Kr") + "\npair_coeff * * Ar Kr")),
    "newton on off": Feature(newton="on off"),
    "pair_modify": Feature(pairs=(lj(), py() + "\npair_modify nofdotr shift yes mix arithmetic")),
    "computes": Feature(
        body="compute r all rdf 20 cutoff 5.0\ncompute n all coord/atom cutoff 4.0\n"
        "compute m all reduce ave c_n\ncompute e all pair {name} epair\n"
        "comm_modify cutoff 9.0\n"
        "thermo_style custom step pe press c_r[5][2] c_r[20][3] c_m c_e\nrun 6\n"
        "thermo_style custom step c_se c_ss[1]\nrun 0"
    ),
    "charge": Feature(style="charge"),
    "molecular": Feature(style="molecular"),
    "full": Feature(style="full"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder and output of a feature; a fifth of all features shares one process."""
    done = {}

    def find(name, ranks):
        share = list(FEATURES).index(name) % 5
        if (share, ranks) not in done:
            folder = tmp_path_factory.mktemp(f"features{share}")
            names = {spaceless(n): feature for n, feature in list(FEATURES.items())[share::5]}
            for each, feature in names.items():
                (folder / each).mkdir()
                write_inputs(folder / each, feature)
            done[share, ranks] = folder, *lmp_in_turn(folder, names, ranks)
        folder, process, outputs = done[share, ranks]
        name = spaceless(name)
        assert name in outputs, f"the process ended before it\n{process.stdout[-2000:]}"
        if list(outputs)[-1] == name:
            assert process.returncode == 0, process.stdout
        return folder / name, outputs[name]

    return find


def spaceless(name):
    return name.replace(" ", "_").replace("/", "_")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FEATURES)
def test_feature(run, name, ranks):
    folder, output = run(name, ranks)
    thermo, _ = assert_twins(folder, output, FEATURES[name].tolerance)
    if name in ("deposit and evaporate", "delete and create", "monte carlo", "atoms lost"):
        counts = np.concatenate([table[:, 1] for table in thermo])
        assert len(set(counts)) > 2, "no atoms came or went"
