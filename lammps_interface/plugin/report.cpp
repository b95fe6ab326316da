// What PairMLIAPPy tells besides energies and forces: who computes where, and the spread of a
// committee for fix pair.

#include "pair_mliap_py.h"

#include "comm.h"
#include "error.h"

#include <algorithm>
#include <cstring>

using namespace LAMMPS_NS;

// Who computes where: one row for each rank, told once after the first step. Each rank has filled
// its own row by then, and with it has checked the exchange.
void PairMLIAPPy::print_ranks()
{
  ranks_printed = true;
  int64_t missing = 0;
  MPI_Allreduce(&view.exchange_missing, &missing, 1, MPI_INT64_T, MPI_SUM, world);
  if (missing != 0)
    error->all(FLERR, "pair_style mliap/py: what {} ghost atoms send back does not arrive at their "
                      "owners; check with: md-plugin doctor", missing);
  constexpr int shown = 64;
  const int length = static_cast<int>(sizeof(view.row));
  std::vector<char> all(comm->me == 0 ? static_cast<size_t>(comm->nprocs) * length : 1);
  MPI_Gather(view.row, length, MPI_CHAR, all.data(), length, MPI_CHAR, 0, world);
  if (comm->me != 0 || !view.header[0]) return;
  std::string table = std::string(view.header) + "\n";
  for (int rank = 0; rank < std::min(comm->nprocs, shown); rank++)
    table += std::string(&all[static_cast<size_t>(rank) * length]) + "\n";
  if (comm->nprocs > shown) table += "... and " + std::to_string(comm->nprocs - shown) + " more\n";
  utils::logmesg(lmp, table);
}

// Flags by which fix pair says that it will read the field of that name after this step.
void *PairMLIAPPy::extract(const char *name, int &dim)
{
  dim = 0;
  if (view.n_models < 2) return nullptr;
  std_flagged = true;
  if (strcmp(name, "force_std_flag") == 0) return &force_std_flag;
  if (strcmp(name, "energy_std_flag") == 0) return &energy_std_flag;
  return nullptr;
}

void *PairMLIAPPy::extract_peratom(const char *name, int &columns)
{
  columns = 0;
  if (view.n_models < 2) return nullptr;
  std_asked = true;
  if (strcmp(name, "force_std") == 0) return force_std.data();
  if (strcmp(name, "energy_std") == 0) return energy_std.data();
  return nullptr;
}
