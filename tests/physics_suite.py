"""Physics that any potential obeys. Inherit, give a `potential` and a `structure`, and run.

A subclass gives two fixtures: `potential`, in float64 on the CPU, and `structure`, with atoms off
symmetric places.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from md_plugin.neighbours import Batch, Structure

EV_PER_AMU = 103.642697  # (Å/fs)^2 amu in eV


def rotation(seed, mirror=False):
    """A random rotation, or a rotation with a mirror."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return q * np.linalg.det(q) * (-1.0 if mirror else 1.0)


def derivative(energies, step):
    """Fourth-order difference from the energies at -2, -1, 1, 2 steps (last axis)."""
    return energies @ np.array([1.0, -8.0, 8.0, -1.0]) / (12.0 * step)


def steepness(slopes):
    """The error of a difference grows with the fifth derivative, so with the size of the slopes:
    1 for a few eV/Å, more for atoms pushed into each other's repulsive wall."""
    return max(1.0, float(slopes.abs().max()) / 10.0)


def moved(structure, positions):
    return replace(structure, positions=positions)


def strained(structure, strain):
    """Everything mapped by x -> x (1 + strain)."""
    f = np.eye(3) + strain
    return replace(structure, positions=structure.positions @ f, cell=structure.cell @ f)


def joined(a, b, offset):
    """Two structures without periodicity in one, `offset` Å apart."""
    positions = np.vstack([a.positions, b.positions + offset])
    return Structure(np.concatenate([a.species, b.species]), positions)


def close(a, b, atol=0.0, rtol=0.0):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=rtol)


def isolated_energy(model, z):
    """Energy of one atom without neighbours, layer by layer on paper."""
    c = model.config
    reference = c.reference_energies[c.species.index(z)] if c.reference_energies else 0.0
    features = torch.eye(len(c.species)).double()[[c.species.index(z)]]
    energy = model.readouts[0](features)
    for block, readout in zip(model.blocks, model.readouts[1:], strict=True):
        first, *others = block
        hidden = first.layer.self_interaction(features)
        # The norm of an environment that is zero is the square root of its regularisation.
        for scale in ("vector_scale", "quadrupole_scale")[: 0 if c.n_max else c.order]:
            hidden = hidden + getattr(first.layer, scale) * c.cusp**0.5
        if c.n_max and c.norm_eps is not None:  # invariants are zero, and remain so normalised
            mixing = first.layer.mixing
            hidden = hidden + torch.einsum("ma,mab->b", mixing.norm_bias, mixing.mixing)
        features = after(first, model.activation(hidden), features)
        for other in others:
            features = after(other, model.activation(other.layer(features)), features)
        energy = energy + readout(features)
    return reference + float(energy.detach())


def after(layer, activated, features):
    """What follows the activation of a layer."""
    return layer.out(activated) + layer.adjust(features) if hasattr(layer, "out") else activated


class PhysicsSuite:
    """Energies in eV, forces in eV/Å. All in float64: tolerances are a few hundred roundings."""

    rounding = 1e-11  # relative to energies of a few eV and forces of a few eV/Å
    difference = 1e-6  # of finite differences, eV/Å and eV

    def test_forces_are_the_slope_of_the_energy(self, potential, structure):
        step, x = 3e-4, structure.positions
        shifts = np.zeros((x.size, 4, *x.shape))
        for k in range(x.size):
            shifts[k].reshape(4, -1)[:, k] = np.array([-2, -1, 1, 2]) * step
        copies = [moved(structure, x + shift) for shift in shifts.reshape(-1, *x.shape)]
        energies = potential.evaluate(copies, forces=False).energy.numpy().reshape(-1, 4)
        forces = potential.evaluate(structure).forces
        assert forces.abs().max() > 1e-3, "a structure without forces tests nothing"
        atol = self.difference * steepness(forces)
        close(forces, -derivative(energies, step).reshape(x.shape), atol=atol)

    def test_virial_is_the_slope_under_strain(self, potential, structure):
        step, unit = 1e-4, np.eye(9).reshape(9, 3, 3)
        copies = [strained(structure, k * step * e) for e in unit for k in (-2, -1, 1, 2)]
        energies = potential.evaluate(copies, forces=False).energy.numpy().reshape(9, 4)
        virial = potential.evaluate(structure).virial[0]
        atol = self.difference * steepness(virial)
        close(virial, -derivative(energies, step).reshape(3, 3), atol=atol)

    def test_virial_is_symmetric(self, potential, structure):
        virial = potential.evaluate(structure).virial[0]
        close(virial, virial.T, atol=self.rounding * 100)

    def test_no_net_force_and_no_net_torque(self, potential, structure):
        forces = potential.evaluate(structure).forces.numpy()
        close(forces.sum(axis=0), np.zeros(3), atol=self.rounding * 100)
        if not structure.pbc.any():
            torque = np.cross(structure.positions, forces).sum(axis=0)
            close(torque, np.zeros(3), atol=self.rounding * 100)

    @pytest.mark.parametrize("mirror", [False, True])
    def test_rotation(self, potential, structure, mirror):
        q = rotation(1, mirror)
        turned = replace(structure, positions=structure.positions @ q, cell=structure.cell @ q)
        before, after = potential.evaluate(structure), potential.evaluate(turned)
        close(after.atom_energy, before.atom_energy, rtol=self.rounding)
        close(after.forces, before.forces.numpy() @ q, atol=self.rounding * 100)
        close(after.virial[0], q.T @ before.virial[0].numpy() @ q, atol=self.rounding * 100)

    def test_permutation(self, potential, structure):
        order = np.random.default_rng(2).permutation(len(structure.species))
        shuffled = replace(
            structure, species=structure.species[order], positions=structure.positions[order]
        )
        before, after = potential.evaluate(structure), potential.evaluate(shuffled)
        close(after.energy, before.energy, rtol=self.rounding)
        close(after.atom_energy, before.atom_energy[order], rtol=self.rounding)
        close(after.forces, before.forces[order], atol=self.rounding * 100)
        close(after.virial, before.virial, atol=self.rounding * 100)

    def test_translation_and_lattice_vectors(self, potential, structure):
        images = np.random.default_rng(3).integers(-2, 3, structure.positions.shape)
        x = structure.positions + np.where(structure.pbc, images, 0) @ structure.cell
        before = potential.evaluate(structure)
        after = potential.evaluate(moved(structure, x + [0.3, -7.0, 11.1]))
        close(after.atom_energy, before.atom_energy, rtol=self.rounding)
        close(after.forces, before.forces, atol=self.rounding * 100)
        close(after.virial, before.virial, atol=self.rounding * 100)

    def test_supercell(self, potential, structure):
        """Two copies of the cell along each periodic direction: the same energy per atom."""
        counts = [2 if p else 1 for p in structure.pbc]
        offsets = np.array(list(np.ndindex(*counts))) @ structure.cell
        large = replace(
            structure,
            species=np.tile(structure.species, len(offsets)),
            positions=(structure.positions + offsets[:, None]).reshape(-1, 3),
            cell=structure.cell * np.array(counts)[:, None],
        )
        before, after = potential.evaluate(structure), potential.evaluate(large)
        close(after.energy, before.energy * len(offsets), rtol=self.rounding)
        close(after.forces, np.tile(before.forces, (len(offsets), 1)), atol=self.rounding * 100)
        close(after.virial, before.virial * len(offsets), atol=self.rounding * 1000)

    def test_far_apart_adds_up(self, potential, structure):
        a = replace(structure, cell=np.zeros((3, 3)), pbc=np.zeros(3, bool))
        b = moved(a, a.positions @ rotation(4))
        apart = potential.evaluate(joined(a, b, [100.0, 3.0, -50.0]))
        one, two = potential.evaluate(a), potential.evaluate(b)
        close(apart.energy, one.energy + two.energy, rtol=self.rounding)
        close(apart.forces, np.vstack([one.forces, two.forces]), atol=self.rounding * 100)
        close(apart.virial, one.virial + two.virial, atol=self.rounding * 100)

    def test_isolated_atoms(self, potential):
        for z in potential.species:
            result = potential.evaluate(Structure(np.array([z]), np.array([[1.0, 2.0, 3.0]])))
            close(result.energy, isolated_energy(potential.model, z), rtol=1e-13, atol=1e-12)
            assert not result.forces.any() and not result.virial.any()

    def test_no_atoms(self, potential):
        result = potential.evaluate(Structure(np.zeros(0, int), np.zeros((0, 3))))
        assert result.energy.tolist() == [0.0]
        assert result.forces.shape == (0, 3) and not result.virial.any()

    def test_smooth_at_the_cutoff(self, potential, structure):
        """An atom that crosses rcut changes energies quadratically and forces linearly."""
        rcut, z = potential.rcut, potential.species[-1]
        base = np.array([[0, 0, 0], [0.4, 0.3, 0.1]]) * rcut

        def jump(delta):
            # the third atom at rcut from the first, out of reach of the second
            x = [np.vstack([base, [-(rcut + s * delta), 0, 0]]) for s in (-1, 1)]
            inside, outside = (potential.evaluate(Structure(np.full(3, z), y)) for y in x)
            return tuple(
                float((a - b).abs().max())
                for a, b in ((inside.energy, outside.energy), (inside.forces, outside.forces))
            )

        (energy_far, force_far), (energy_near, force_near) = jump(1e-3), jump(1e-5)
        assert force_far > 0, "nothing is felt below the cutoff"
        assert energy_near < 1e-3 * energy_far + 1e-12
        assert force_near < 2e-2 * force_far + 1e-12

    def test_pairs_of_the_skin_are_exactly_nothing(self, potential, structure):
        narrow = Batch.from_structures([structure], potential.rcut)
        wide = Batch.from_structures([structure], potential.rcut + 1.0)
        results = [potential.evaluate_pairs(b.species, b.pairs, b.r_ij) for b in (narrow, wide)]
        beyond = wide.r_ij.norm(dim=1) >= potential.rcut
        assert beyond.any()
        assert not results[1].pair_gradient[beyond].any()
        # Zeros between the terms may regroup a sum: a few roundings.
        close(results[1].energy, results[0].energy, rtol=1e-14)
        close(results[1].forces, results[0].forces, atol=self.rounding)
        close(results[1].virial, results[0].virial, atol=self.rounding)

    def test_batch_equals_singles(self, potential, structure):
        q = rotation(5)
        others = [
            moved(structure, structure.positions * 1.03),
            Structure(structure.species[:1], np.zeros((1, 3))),
            Structure(np.zeros(0, int), np.zeros((0, 3))),
            replace(structure, positions=structure.positions @ q, cell=structure.cell @ q),
        ]
        batch = [structure, *others]
        together, first = potential.evaluate(batch), 0
        for k, single in enumerate(batch):
            alone, last = potential.evaluate(single), first + len(single.species)
            close(together.energy[k], alone.energy[0], rtol=1e-14)
            close(together.forces[first:last], alone.forces, atol=self.rounding)
            close(together.virial[k], alone.virial[0], atol=self.rounding * 10)
            first = last

    def test_energy_alone_is_the_same_energy(self, potential, structure):
        alone = potential.evaluate(structure, forces=False)
        assert torch.equal(alone.energy, potential.evaluate(structure).energy)
        assert alone.forces is None and alone.virial is None and alone.pair_gradient is None
        assert not alone.energy.requires_grad


def total_energies(potential, structure, timestep, n_steps, velocities, mass=12.0):
    """Velocity Verlet in fs, Å, eV, amu -> total energy after each step."""
    factor = 0.5 * timestep / (mass * EV_PER_AMU)
    result, x, v, energies = potential.evaluate(structure), structure.positions, velocities, []
    for _ in range(n_steps):
        v = v + factor * result.forces.numpy()
        x = x + timestep * v
        result = potential.evaluate(moved(structure, x))
        v = v + factor * result.forces.numpy()
        energies.append(float(result.energy) + 0.5 * mass * EV_PER_AMU * float((v**2).sum()))
    return np.array(energies)
