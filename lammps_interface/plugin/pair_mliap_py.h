// pair_style mliap/py: runs MLIAPUnified objects in a LAMMPS that has no Python built in.
//
//   pair_style mliap/py unified FILE [0]        (or `mliap` under `lmp -sf py`)
//   pair_coeff * * El1 El2 ...                  one element, or NULL, for each atom type
//
// The pair list is copied once per rebuild into compressed rows, or is not made at all where the
// model finds its pairs on a GPU; each step hands Python the
// address of an MLIAPView and adds what comes back to forces, energy and virial. Feature
// exchanges run over LAMMPS's own forward and reverse communication.

#ifndef MD_PLUGIN_PAIR_MLIAP_PY_H
#define MD_PLUGIN_PAIR_MLIAP_PY_H

#include "mliap_view.h"
#include "pair.h"
#include "python_host.h"

#include <functional>
#include <string>
#include <vector>

namespace LAMMPS_NS {

class PairMLIAPPy : public Pair {
 public:
  explicit PairMLIAPPy(class LAMMPS *);
  ~PairMLIAPPy() override;

  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  double memory_usage() override;
  void *extract(const char *, int &) override;
  void *extract_peratom(const char *, int &) override;

  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;

 private:
  void set_callbacks();
  void allocate();
  void check_special_bonds();
  void fill_view(int, int);
  void tally();
  void print_ranks();
  void together(const std::function<void()> &);
  [[noreturn]] void stop(const std::string &);

  int list_pairs();
  int inside_pairs();
  int pair_forces(const double *);
  int exchange(int, void *, int64_t, int64_t, int, int);
  template <typename Body> static int guarded(void *, Body);
  template <typename Real> void add_rows(int, const int *, const double *);

  MLIAPView view;
  mdp::Object session;
  std::string error_text, mpi_library;
  bool ranks_printed;

  class NeighList *seen;       // the list of the last step
  class NeighList *rows_of;    // the list that the rows below were copied from, null after a rebuild
  std::vector<int> row_ptr, sender, local, elems, type_map;
  std::vector<double> eatoms;

  // spread of a committee, for fix pair
  std::vector<double> force_std, energy_std;
  int force_std_flag, energy_std_flag;    // set by fix pair before the steps that it reads
  bool std_asked, std_flagged;

  std::vector<int> inside_row, inside_i, inside_j, numneighs;
  std::vector<double> inside_rij;
  bool inside_known;

  // the exchange in progress: n_bytes of each row, from first_byte on
  char *rows;
  int64_t row_bytes;
  int n_bytes, item_bytes, n_slots;
};

}    // namespace LAMMPS_NS

#endif
