// Feature exchange of PairMLIAPPy over LAMMPS's own communication.
//
//   forward: ghost rows become copies of their owners' rows
//   reverse: ghost rows are added to their owners' rows (the adjoint of forward)
//
// Rows of float32 or float64 travel as bytes inside LAMMPS's buffers of doubles.

#include "pair_mliap_py.h"

#include "comm.h"

#include <cstring>

using namespace LAMMPS_NS;

int PairMLIAPPy::exchange(int reverse, void *data, int64_t stride, int64_t first_byte, int bytes,
                          int item)
{
  n_slots = static_cast<int>((bytes + sizeof(double) - 1) / sizeof(double));
  if (n_slots > comm_forward)
    throw std::length_error("exchange is wider than the buffers that LAMMPS was asked for");
  rows = static_cast<char *>(data) + first_byte;
  row_bytes = stride;
  n_bytes = bytes;
  item_bytes = item;
  if (reverse)
    comm->reverse_comm(this, n_slots);
  else
    comm->forward_comm(this, n_slots);
  return 0;
}

int PairMLIAPPy::pack_forward_comm(int n, int *atoms, double *buf, int, int *)
{
  for (int k = 0; k < n; k++) memcpy(buf + k * n_slots, rows + atoms[k] * row_bytes, n_bytes);
  return n * n_slots;
}

void PairMLIAPPy::unpack_forward_comm(int n, int first, double *buf)
{
  for (int k = 0; k < n; k++) memcpy(rows + (first + k) * row_bytes, buf + k * n_slots, n_bytes);
}

int PairMLIAPPy::pack_reverse_comm(int n, int first, double *buf)
{
  for (int k = 0; k < n; k++) memcpy(buf + k * n_slots, rows + (first + k) * row_bytes, n_bytes);
  return n * n_slots;
}

template <typename Real> void PairMLIAPPy::add_rows(int n, const int *atoms, const double *buf)
{
  const int width = n_bytes / static_cast<int>(sizeof(Real));
  for (int k = 0; k < n; k++) {
    Real *owner = reinterpret_cast<Real *>(rows + atoms[k] * row_bytes);
    const Real *ghost = reinterpret_cast<const Real *>(buf + k * n_slots);
    for (int a = 0; a < width; a++) owner[a] += ghost[a];
  }
}

void PairMLIAPPy::unpack_reverse_comm(int n, int *atoms, double *buf)
{
  if (item_bytes == sizeof(float))
    add_rows<float>(n, atoms, buf);
  else
    add_rows<double>(n, atoms, buf);
}
