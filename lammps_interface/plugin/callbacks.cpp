// What Python calls back for during a step: pair arrays inside the cutoff, pair forces, exchanges.

#include "pair_mliap_py.h"

#include "atom.h"
#include "neigh_list.h"
#include "neighbor.h"

#include <stdexcept>

using namespace LAMMPS_NS;

// Callbacks are called from Python: no exception may pass through its frames.
template <typename Body> int PairMLIAPPy::guarded(void *pair, Body body)
{
  auto *self = static_cast<PairMLIAPPy *>(pair);
  try {
    return body(self);
  } catch (const std::exception &e) {
    self->error_text = e.what();
    self->view.error_text = self->error_text.c_str();
    return 1;
  }
}

void PairMLIAPPy::set_callbacks()
{
  view.inside_pairs = [](void *pair) {
    return guarded(pair, [](PairMLIAPPy *p) { return p->inside_pairs(); });
  };
  view.list_pairs = [](void *pair) {
    return guarded(pair, [](PairMLIAPPy *p) { return p->list_pairs(); });
  };
  view.pair_forces = [](void *pair, const double *fij) {
    return guarded(pair, [=](PairMLIAPPy *p) { return p->pair_forces(fij); });
  };
  view.exchange = [](void *pair, int32_t reverse, void *data, int64_t stride, int64_t first,
                     int32_t bytes, int32_t item) {
    return guarded(pair, [=](PairMLIAPPy *p) {
      return p->exchange(reverse, data, stride, first, bytes, item);
    });
  };
}

// The neighbour list as compressed rows, copied once after each rebuild. With other pair styles
// beside this one the list may reach further than this style needs; such pairs are left out.
int PairMLIAPPy::list_pairs()
{
  if (rows_of == list) return 0;
  if (list->occasional) neighbor->build_one(list);
  if (view.whole_list && list->inum != atom->nlocal)
    throw std::logic_error("LAMMPS lists neighbours of some local atoms only");
  const double reach = view.rcut + neighbor->skin;
  const double reach_sq = neighbor->ago == 0 ? reach * reach : 1e300;
  double **x = atom->x;
  row_ptr.resize(list->inum + 1);
  row_ptr[0] = 0;
  int64_t longest = 0;
  for (int k = 0; k < list->inum; k++) longest += list->numneigh[list->ilist[k]];
  if (longest > MAXSMALLINT)
    stop("more than 2147483647 pairs on one rank; use more ranks");
  sender.resize(longest);

  int n_pair = 0;
  for (int k = 0; k < list->inum; k++) {
    const int i = list->ilist[k];
    const int *neighbours = list->firstneigh[i];
    for (int m = 0; m < list->numneigh[i]; m++) {
      const int j = neighbours[m] & NEIGHMASK;
      const double dx = x[j][0] - x[i][0], dy = x[j][1] - x[i][1], dz = x[j][2] - x[i][2];
      // written so that a pair with NaN coordinates stays in, for Python to name
      if (dx * dx + dy * dy + dz * dz > reach_sq) continue;
      sender[n_pair++] = j;
    }
    row_ptr[k + 1] = n_pair;
  }
  sender.resize(n_pair);
  rows_of = list;
  view.row_ptr = row_ptr.data();
  view.sender = sender.data();
  view.n_pair = n_pair;
  return 0;
}

// LAMMPS's own arrays of pairs strictly inside the cutoff, for objects that ask for them.
int PairMLIAPPy::inside_pairs()
{
  if (inside_known) return 0;
  list_pairs();
  double **x = atom->x;
  const double cut_sq = view.rcut * view.rcut;
  numneighs.assign(view.nlist, 0);
  for (auto *v : {&inside_row, &inside_i, &inside_j}) v->clear();
  inside_rij.clear();
  for (int k = 0; k < view.nlist; k++) {
    const int i = view.ilist[k];
    for (int p = row_ptr[k]; p < row_ptr[k + 1]; p++) {
      const int j = sender[p];
      const double d[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
      if (d[0] * d[0] + d[1] * d[1] + d[2] * d[2] >= cut_sq) continue;
      inside_row.push_back(k);
      inside_i.push_back(i);
      inside_j.push_back(j);
      inside_rij.insert(inside_rij.end(), d, d + 3);
      numneighs[k]++;
    }
  }
  view.n_inside = static_cast<int64_t>(inside_i.size());
  view.inside_row = inside_row.data();
  view.inside_i = inside_i.data();
  view.inside_j = inside_j.data();
  view.inside_rij = inside_rij.data();
  view.numneighs = numneighs.data();
  inside_known = true;
  return 0;
}

// f_i += f_ij, f_j -= f_ij, virial -= r_ij f_ij, half of it to each end: the meaning that
// LAMMPS's ML-IAP package gives to update_pair_forces.
int PairMLIAPPy::pair_forces(const double *fij)
{
  double **f = atom->f;
  constexpr int row[6] = {0, 1, 2, 0, 0, 1}, column[6] = {0, 1, 2, 1, 2, 2};
  for (int64_t p = 0; p < view.n_inside; p++) {
    const int i = inside_i[p], j = inside_j[p];
    const double *fp = fij + 3 * p, *rp = inside_rij.data() + 3 * p;
    for (int d = 0; d < 3; d++) {
      f[i][d] += fp[d];
      f[j][d] -= fp[d];
    }
    if (!vflag_either) continue;
    for (int k = 0; k < 6; k++) {
      const double v = -rp[row[k]] * fp[column[k]];
      view.virial[k] += v;
      if (vflag_atom) {
        vatom[i][k] += 0.5 * v;
        vatom[j][k] += 0.5 * v;
      }
    }
  }
  return 0;
}
